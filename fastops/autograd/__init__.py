"""`torch.autograd.Function` subclasses with hand-written backward, one file per op, over the raw ops of ``ops.py``."""
