"""Drop-in `torch.nn.Module` replacements, one file per family."""

from .conv import *
from .linear import *
from .loss import *
from .norm import *
from .pool import *
