"""Pretrain a Megatron-Core GPT with FP8 attention scaled from its weights: `torchrun pretrain.py --help`."""

import sys

from megatron_geoscale.training.main import main

if __name__ == "__main__":
    sys.exit(main())
