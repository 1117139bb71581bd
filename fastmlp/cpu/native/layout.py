"""What describes a network and a call to the compiled step: the places of numbers in three arrays.

``call`` is int64: where the other two are, and what to train on. ``net`` is int64 too: a header, then a record per
layer, with sizes, and addresses of units, parameters, optimizer states and buffers. ``hyper`` is float64: numbers of
the loss and the rule, then ``lr`` and ``weight_decay`` per group. The compiled code and the code that fills the arrays
both read this file.
"""

from __future__ import annotations

# ``call``.
STATUS = 0  #: written: 0, or 1 where a class number is out of range, and nothing has changed
INPUTS = 1  #: address of X
TARGETS = 2
LOSSES = 3  #: where the loss of each step goes
ORDER = 4  #: address of the numbers of the rows, int64; 0: rows in order
RATES = 5  #: address of the learning rates of each step and group, float64; 0: those in ``hyper``
ROWS = 6
BATCH = 7  #: rows of a step
HOW = 8  #: how the inputs come
X_ROW = 9  #: strides in elements
X_COLUMN = 10
Y_ROW = 11
Y_COLUMN = 12
NET = 13  #: addresses of the other arrays
HYPER = 14
COUNT = 15  #: address of the number of updates, float32
MEMBER = 16  #: the number of the member in its ensemble
WEIGHTS = 17  #: address of the sample weights
WEIGHT_ROW = 18  #: their stride; 0: all are the number at the address
CALL = 19

# The header of ``net``.
LAYERS = 0
LOSS = 1  #: address of a unit of ``losses`` or ``row_weights``
RULE = 2  #: of ``rules``
LOWEST = 3  #: the first layer with something to train
GROUPS = 4
X = 5  #: [M, K]: gathered, converted inputs
TRANSPOSED = 6  #: X^T [K, padded M], or W^T [K, N] where W is smaller than X and Z
PRODUCT = 7  #: [largest N, padded M]
DA = 8  #: [threads, M, largest N]
DA_NEXT = 9
DW = 10  #: [threads, ...], the gradient of a block of rows of a weight
DB = 11  #: [largest N]
COUNTS = 12  #: whether the number of updates counts
CLIPS = 13  #: address of ``backward.clipped``, where gradients are clipped; else 0
AVERAGES = 14  #: address of ``backward.averaged``, where there is a moving average; else 0
PLAIN = 15  #: whether the update is W -= lr dW and nothing else
CLASSES = 16  #: whether the targets are class numbers
FORWARD = 17  #: addresses of the units of ``products``
PRODUCTS = 18
GATHER = 19  #: of ``whole``
BACKWARD = 20  #: of ``backward``
IGNORED = 21  #: the label that need not be a class; 0, which is one, where there is none
PER_CLASS = 22  #: address of the factors of the classes
PER_CLASS_STEP = 23  #: their stride; 0: all are the number at the address
DROP = 24  #: address of ``dropout.dropped``, where a layer drops
STATE = 25  #: of dropout: address of (seed, step)
ADVANCES = 26  #: whether the run adds its steps to the state
STREAM = 27
STORES = 28  #: whether all gradients are stored before anything is updated
UPDATES = 29  #: whether anything is updated
RUN = 30  #: of ``whole``
THREADS = 31  #: the most threads of a step
DA_ROOM = 32  #: elements of one thread
DW_ROOM = 33
TEAM = 34  #: addresses of OpenMP's functions where ``THREADS`` > 1, from ``START`` to ``LIMIT``
HEADER = 40

# From ``TEAM`` on.
START = 0  #: GOMP_parallel, which begins a team
BARRIER = 1  #: GOMP_barrier
THREAD = 2  #: omp_get_thread_num
SIZE = 3  #: omp_get_num_threads
MOST = 4  #: omp_get_max_threads
LIMIT = 5  #: of a number of threads that no team exceeds

# A layer's record.
N = 0
K = 1
ACTIVATE = 2  #: addresses of units of ``activations`` and ``derivatives``; 0: the identity
DERIVE = 3
BLOCK = 4  #: rows of W that the backward pass takes together
A = 5  #: [M, N]
Z = 6  #: [M, N], the same as A unless f' needs Z
OUT = 7  #: what the next layer reads: A, or [M, N] after dropout
FACTORS = 8  #: [M, N], keep / (1 - p)
THRESHOLD = 9  #: the least number of 16 bits whose element is kept; 0: nothing is dropped
WEIGHT = 10  #: the records of the two parameters
BIAS = 18
RECORD = 26

# A parameter's record.
PARAMETER = 0  #: 0: there is none
TRAINED = 1
GROUP = 2
STATES = 3  #: of three states
GRADIENT = 6  #: where ``STORES``
AVERAGE = 7  #: where ``AVERAGES``

# ``hyper``.
DELTA = 0  #: of huber's loss
MAX_NORM = 1
SIGN = 2  #: -1 to go up the gradient
NUMBERS = 3  #: five numbers of the rule
EMA = 8  #: weight of the parameters in their average
EMA_WARMS = 9  #: whether the weight is larger at first
SMOOTHING = 10  #: of labels
OF_GROUPS = 11  #: lr and weight decay of each group, then each layer's probability to drop

# How the inputs come.
READY, VALUES, PIXELS = 0, 1, 2
