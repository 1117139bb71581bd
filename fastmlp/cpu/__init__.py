"""How matrix products run on a CPU: which library multiplies, with how many threads, in which dtype; dropout's masks.

These names are all that the rest of fastmlp uses.
"""

from .cache import about_choices
from .choose import adopt_choices, get_cpu_gemm, named_choices, set_cpu_gemm
from .dropout import dropout_factors, dropout_keep, times_kept
from .ensembles import MEMBER_WAYS, NATIVE_WAYS, member_way
from .layers import Products, layer_products
from .native import LayerParts, LossUnit, NativeMembers, NativeNetwork, unit_names
from .native import Parameter as NativeParameter
from .native import Units as NativeUnits
from .native import layout as native_layout
from .processor import instruction_set, processor_name, product_dtype
from .products import dgrad, linear, wgrad
from .threads import at_once
from .whole_step import NativePlan, native_rows, native_units, plan_step

__all__ = [
    "MEMBER_WAYS",
    "NATIVE_WAYS",
    "LayerParts",
    "LossUnit",
    "NativeMembers",
    "NativeNetwork",
    "NativeParameter",
    "NativePlan",
    "NativeUnits",
    "Products",
    "about_choices",
    "adopt_choices",
    "at_once",
    "dgrad",
    "dropout_factors",
    "dropout_keep",
    "get_cpu_gemm",
    "instruction_set",
    "layer_products",
    "linear",
    "member_way",
    "named_choices",
    "native_layout",
    "native_rows",
    "native_units",
    "plan_step",
    "processor_name",
    "product_dtype",
    "set_cpu_gemm",
    "times_kept",
    "unit_names",
    "wgrad",
]
