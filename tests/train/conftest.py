"""What the training commands make of the tiny recipe, made once."""

import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_recipe, tiny_data, cli):
    """autoencoder, judge and base folders, each made by its command."""
    root = tmp_path_factory.mktemp("trained")
    for command, out, more in (
        ("train-autoencoder", "autoencoder", ()),
        ("train-judge", "judge", ()),
        ("train-teacher", "base", ("--autoencoder", root / "autoencoder")),
    ):
        done = cli(command, tiny_recipe, "--data", tiny_data, "--out", root / out, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished" in done.stdout and "UNEXPECTED" not in done.stdout + done.stderr
    return root
