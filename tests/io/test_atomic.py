import os
import signal
import subprocess
import sys

from codi_jax.io.atomic import partial_path

KILLED_WHILE_SAVING = """
import os, signal, sys
import jax
from codi_jax.io import weights
from codi_jax.models.vae import AutoencoderKL, VAEConfig

config = VAEConfig.from_dict({"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "layers_per_block": 1})
module = AutoencoderKL(config)
params = module.random_params(jax.random.key(0))
if sys.argv[2] == "kill":
    weights._write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
weights.save_model(sys.argv[1], "vae", module, params)
"""


def test_a_killed_export_leaves_nothing_after_the_next_one(tmp_path):
    def save(how: str) -> int:
        command = [sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path, how]
        return subprocess.run(command, check=False, env=os.environ).returncode

    assert save("kill") == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".vae.partial-")
    assert save("whole") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_only_what_is_left_of_the_same_target_is_removed(tmp_path):
    for name in (".unet.partial-1", ".unet_target.partial-1", ".u[n]et.partial-1", "unet", ".unet"):
        (tmp_path / name).mkdir()
    (tmp_path / ".unet.partial-2").write_text("half")
    path = partial_path(tmp_path / "unet")
    assert path.parent == tmp_path
    assert not path.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".unet_target.partial-1", ".u[n]et.partial-1", "unet", ".unet"}
    partial_path(tmp_path / "u[n]et")
    assert not (tmp_path / ".u[n]et.partial-1").exists()
