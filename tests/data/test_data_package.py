"""The names of `codi_jax.data`, imported when they are used."""

import subprocess
import sys

import pytest

import codi_jax.data


@pytest.mark.parametrize("module", ["codi_jax.data", "codi_jax.data.files", "codi_jax.data.picture_folders"])
def test_a_module_of_the_package_is_imported_alone(module: str):
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"datasets", "grain", "huggingface_hub", "jax"} & {name.partition(".")[0] for name in loaded}


def test_the_package_has_the_names_that_it_lists():
    assert all(getattr(codi_jax.data, name) is not None for name in codi_jax.data.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'none'"):
        getattr(codi_jax.data, "none")  # noqa: B009
