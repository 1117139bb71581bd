# What the project can be asked to do. PYTHON is the interpreter of an environment with `pip install -e '.[dev]'`.
PYTHON ?= $(shell command -v python || command -v python3)
PYTEST = $(PYTHON) -m pytest -q -n 2 --dist worksteal

.PHONY: test lint types unit lesser-cpus interpret compile compile-all launch execute placement bench-smoke fuzz docs test-gpu

# Only test-gpu is about the GPU at hand: the rest does what it does on a machine without one, where lanes simulate it.
test unit lesser-cpus interpret compile compile-all launch execute placement: export CUDA_VISIBLE_DEVICES =

test: lint types interpret lesser-cpus  ## everything that CI runs: the other lanes and the benchmarks share one run of pytest
	$(PYTEST) tests bench --benchmark-disable -m "not interpret"

lint:  ## the sources, and the workflows of CI
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	"$$($(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")"/zizmor --offline --quiet .github

types:
	$(PYTHON) -m mypy

unit:  ## everything that needs no kernel
	$(PYTEST) -m "not interpret and not compile and not launch and not execute and not placement and not gpu"

lesser-cpus:  ## what depends on the processor, as on one without AVX2 and with one thread, and as on one with AVX2
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 $(PYTEST) --lesser-cpu tests
	@if $(PYTHON) -c "import torch; raise SystemExit(torch.backends.cpu.get_cpu_capability() != 'AVX512')"; then set -x; \
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) --lesser-cpu tests; fi

interpret:  ## lane 1: the kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) -m interpret

compile:  ## lane 2: every kernel compiled for every target, and the limits
	$(PYTEST) -m compile

compile-all:  ## the whole product of kernels, dtypes, tiles and variants, not the set that covers it: hours on two cores
	$(PYTEST) -m compile --full

launch:  ## lane 3: the launches of the whole library, recorded
	$(PYTEST) -m launch

execute:  ## lane 4: the compiled kernels executed on a simulated GPU
	$(PYTEST) -m execute

placement:  ## lane 5: what only CUDA does, on fake CUDA tensors
	$(PYTEST) -m placement

bench-smoke:  ## every benchmark built, judged against float64 and called once; no times
	$(PYTEST) bench --benchmark-disable

docs:  ## the pages of docs/ and the API as HTML in build/docs; needs `pip install -e '.[docs]'`, and warnings are errors
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs . build/docs

fuzz:  ## a night's worth of drawn cases
	TRITON_INTERPRET=1 $(PYTEST) tests/fuzz --hypothesis-profile=night
	$(PYTEST) tests/fuzz --hypothesis-profile=night

test-gpu:  ## on a machine with a GPU: the tests of the kernels there, those that fill its memory one by one
	@$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'make test-gpu needs a GPU that torch can use'"
	$(PYTHON) -m pytest -q -n auto --dist worksteal -m "gpu and not large"; others=$$?; \
	$(PYTHON) -m pytest -q -m "gpu and large" && exit $$others
