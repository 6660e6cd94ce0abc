"""The largest value of what counts something.

Each is over all that anybody has use for. It is looked at before anything is made of the number: nobody waits for 10^12
epochs, no system starts 10^12 threads, and a layer of a billion channels ends in the kernel's out-of-memory killer, not in
an error.
"""

from __future__ import annotations

INT64 = 2**63  # whole numbers are below it, and at least its negative

# of a run or a store
MAX_EPOCHS = 1_000_000
MAX_BATCH = 65_536  # images a step or a forward pass
MAX_WORKERS = 256  # processes
MAX_THREADS = 1_024
MAX_PROCESSES = 65_536  # of torchrun
MAX_ROWS = 2**31 - 1  # of a shard, or to read
MAX_SEED = INT64 - 1
MAX_RUNS = 1_000  # of --seeds
MAX_RATE = 1_000.0  # learning rate and weight decay; a loss is not finite long before
MAX_FLOAT = 1e12  # any other number that is no count; as a float32 it is far from infinity still

# of data
MAX_SIDE = 16_384  # pixels of a canvas; an image of 16,384 x 16,384 takes 3 GB as floats
MAX_VIEWS = 1_000  # of an image
MAX_IMAGES = 1_000_000  # to draw
MAX_CLASSES = 65_536  # the largest detection sets have 13,000

# of a model: from and to. ResNets have 2,048 channels, and no paper has more than 8 convolutions in a tower
MODEL_COUNTS = {
    "num_classes": (1, MAX_CLASSES), "fpn_channels": (1, 4_096), "tower_convs": (0, 64), "head_channels": (1, 8_192),
    "reg_max": (1, 1_024),
}  # fmt: skip
MAX_PARAMETERS = 2_000_000_000  # of neck and head: 8 GB

# of JSON and TOML
MAX_DEPTH = 32  # of tables and lists: the deepest that kdcli writes, a manifest, has 6
MAX_JSON = 256 * 2**20  # characters; the manifest of a store that leaves out a million images has 10 MB
MAX_TOML = 4 * 2**20
