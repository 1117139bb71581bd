"""What describes a network to the compiled step: the places of its numbers in two arrays.

``net`` is int64: a header, then a record per layer. It has sizes, codes, and the addresses of parameters, optimizer
states and buffers. ``hyper`` is float64: numbers of the loss and the rule, then ``lr`` and ``weight_decay`` per group.
The compiled code and the code that fills the arrays both read this file.
"""

from __future__ import annotations

# The header of ``net``.
LAYERS = 0
LOSS = 1  #: address of a unit of ``losses``
RULE = 2  #: of ``rules``
LOWEST = 3  #: the first layer with something to train
GROUPS = 4
X = 5  #: [M, K]: gathered, converted inputs
TRANSPOSED = 6  #: [largest K, padded M]
PRODUCT = 7  #: [largest N, padded M]
DA = 8  #: [M, largest N]
DA_NEXT = 9
DW = 10  #: the gradient of a block of rows of a weight
DB = 11  #: [largest N]
COUNTS = 12  #: whether the number of updates counts
CLIPS = 13  #: whether the norm of all gradients is needed before the update
AVERAGES = 14  #: whether there is a moving average of the parameters
PLAIN = 15  #: whether the update is W -= lr dW and nothing else
CLASSES = 16  #: whether the targets are class numbers
FORWARD = 17  #: addresses of the units of ``products``
PRODUCTS = 18
HEADER = 19

# A layer's record.
N = 0
K = 1
ACTIVATE = 2  #: addresses of two units of ``activations``; 0: the identity
DERIVE = 3
BLOCK = 4  #: rows of W that the backward pass takes together
A = 5  #: [M, N]
Z = 6  #: [M, N], the same as A unless f' needs Z
WEIGHT = 7  #: the records of the two parameters
BIAS = 15
RECORD = 23

# A parameter's record.
PARAMETER = 0  #: 0: there is none
TRAINED = 1
GROUP = 2
STATES = 3  #: of three states
GRADIENT = 6  #: where ``CLIPS``
AVERAGE = 7  #: where ``AVERAGES``

# ``hyper``.
DELTA = 0  #: of huber's loss
MAX_NORM = 1
SIGN = 2  #: -1 to go up the gradient
NUMBERS = 3  #: five numbers of the rule
EMA = 8  #: weight of the parameters in their average
EMA_WARMS = 9  #: whether the weight is larger at first
OF_GROUPS = 10  #: lr and weight decay of each group

# How the inputs come.
READY, VALUES, PIXELS = 0, 1, 2
