"""FP8 attention scales predicted from the weights, for Megatron-Core.

The norms of the attention weights bound every tensor that attention casts to FP8. The scales made from those bounds
need no history, so nothing has to settle after a checkpoint is loaded, a run resumes or the weights jump.
"""

__version__ = "0.1.0"
