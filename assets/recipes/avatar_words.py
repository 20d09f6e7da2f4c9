"""Writes captions of avatars and instructions to edit them, to learn a vocabulary from.

python3 assets/recipes/avatar_words.py words.txt
"""

import sys
from pathlib import Path

import numpy as np

from codi_jax.data.avatars.captions import caption, random_edit
from codi_jax.data.avatars.looks import random_look

COUNT = 20_000  # of each

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    captions = [caption(random_look(rng, "train"), rng) for _ in range(COUNT)]
    instructions = [random_edit(rng, "train").instruction for _ in range(COUNT)]
    Path(sys.argv[1]).write_text("\n".join([*captions, *instructions]) + "\n")
