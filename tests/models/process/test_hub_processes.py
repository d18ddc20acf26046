"""What a hub does in a process of its own: the hub's environment variables, a drive that fills up."""

from __future__ import annotations

from pathlib import Path

from flux2_studio.models.hub.repositories import Hub
from tests.models.fake_hub import (
    COMMIT,
    FLOW,
    MB,
    TOY,
    FakeHub,
    python,
    settings,
    silent,
)


def test_the_hubs_own_variables_are_honoured(fake: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when huggingface_hub is imported: in processes of their own."""
    program = f"""
from pathlib import Path
from flux2_studio.errors import DownloadError
from flux2_studio.models.hub.repositories import Hub
from tests.models.fake_hub import FLOW, VAE, settings, silent
ours = Hub(settings(Path({str(tmp_path)!r})))
print(ours.is_on_disk(VAE), ours.find_or_download(VAE, silent).weights)
try:
    print(ours.find_or_download(FLOW, silent).weights.name)
except DownloadError as error:
    print(error)
"""
    home = tmp_path / "hf-home"
    first = python(program, HF_ENDPOINT=fake.url, HF_HOME=str(home)).splitlines()
    assert first[0].startswith("False ") and str(home) in first[0]
    assert first[1] == "toy.safetensors"
    for blob in (home / "hub" / "models--maker--Toy-4B" / "snapshots" / COMMIT).glob("toy*"):
        blob.unlink()
    fake.asked.clear()
    second = python(program, HF_ENDPOINT=fake.url, HF_HOME=str(home), HF_HUB_OFFLINE="1").splitlines()
    assert second[0] == first[0].replace("False", "True")
    assert second[1] == (
        "maker/Toy-4B/toy.safetensors is not on this machine, and HF_HUB_OFFLINE forbids downloading it: unset that "
        "variable, or set TOY_MODEL_PATH to a local copy."
    )
    assert fake.asked == []


def test_a_drive_that_fills_up(fake: FakeHub, tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from flux2_studio.errors import DownloadError
from flux2_studio.models.hub.repositories import Hub
from tests.models.fake_hub import FLOW, settings, silent
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    Hub(settings(Path({str(tmp_path)!r}))).find_or_download(FLOW, silent)
except DownloadError as error:
    print(error)
"""
    home = tmp_path / "hf-home"
    assert python(program, HF_ENDPOINT=fake.url, HF_HOME=str(home)) == (
        f"There is no room for maker/Toy-4B/toy.safetensors (3.0 MB) in {home}/hub: free some space, or set HF_HOME "
        f"to a folder on a larger drive, or set TOY_MODEL_PATH to a local copy. What has arrived is kept.\n"
    )
    ours = Hub(settings(tmp_path), endpoint=fake.url, cache=home / "hub")
    assert ours.size_on_disk(FLOW) == MB
    assert ours.find_or_download(FLOW, silent).weights.read_bytes() == TOY
    assert fake.sent == [("toy.safetensors", None), ("toy.safetensors", f"bytes={MB}-{3 * MB - 1}")]
