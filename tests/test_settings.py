"""What the environment can say."""

from __future__ import annotations

import re
from pathlib import Path

import platformdirs
import pytest

from flux2_studio.errors import RequestError, StudioError
from flux2_studio.settings import Settings


def test_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings.home == Path(platformdirs.user_data_dir("flux2-studio", appauthor=False))
    assert settings.outputs == settings.home / "outputs"
    assert (settings.device, settings.dtype, settings.preview) == ("auto", "auto", "tiny")
    assert settings.default_checkpoint == "nano"
    assert settings.overrides == {}
    assert not settings.on_space
    assert settings.assets.is_dir()


def test_variables(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "FLUX2_HOME": str(tmp_path),
            "FLUX2_CHECKPOINT": "klein-4b",
            "FLUX2_DEVICE": "cuda:1",
            "FLUX2_DTYPE": "bfloat16",
            "FLUX2_PREVIEW": "off",
            "SPACE_ID": "someone/flux2-studio",
        }
    )
    assert settings.home == tmp_path
    assert settings.checkpoint(None).name == "klein-4b"
    assert (settings.device, settings.dtype, settings.preview) == ("cuda:1", "bfloat16", "off")
    assert settings.on_space


def test_home_may_start_with_a_tilde() -> None:
    assert Settings.from_environment({"FLUX2_HOME": "~/pictures"}).home == Path.home() / "pictures"


@pytest.mark.parametrize(
    "variable",
    [
        "FLUX2_MODEL_PATH",
        "AE_MODEL_PATH",
        "KLEIN_4B_MODEL_PATH",
        "KLEIN_4B_BASE_MODEL_PATH",
        "KLEIN_9B_MODEL_PATH",
        "KLEIN_9B_BASE_MODEL_PATH",
        "KLEIN_9B_KV_MODEL_PATH",
        "QWEN3_4B_MODEL_PATH",
        "QWEN3_8B_MODEL_PATH",
        "MISTRAL_MODEL_PATH",
    ],
)
def test_path_overrides_have_the_official_names(variable: str) -> None:
    settings = Settings.from_environment({variable: "~/weights/file.safetensors", "OTHER_MODEL_PATH": "/nowhere"})
    assert settings.overrides == {variable: Path.home() / "weights/file.safetensors"}
    assert Settings.from_environment({variable: ""}).overrides == {}


def test_an_empty_variable_counts_as_unset() -> None:
    own = ("HOME", "CHECKPOINT", "CHECKPOINTS_DIR", "DEVICE", "DTYPE", "QUANTIZE", "PREVIEW")
    names = [f"FLUX2_{name}" for name in own]
    assert Settings.from_environment(dict.fromkeys(names, "")) == Settings.from_environment({})


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("FLUX2_DTYPE", "float8", "FLUX2_DTYPE is 'float8'; set it to one of: auto, float32, bfloat16, float16"),
        ("FLUX2_QUANTIZE", "4", "FLUX2_QUANTIZE is '4'; set it to one of: off, fp8, int8"),
        ("FLUX2_PREVIEW", "yes", "FLUX2_PREVIEW is 'yes'; set it to one of: tiny, linear, off"),
        ("FLUX2_HOME", "~no-such-user/x", "FLUX2_HOME is '~no-such-user/x', in a home folder that is not known"),
        ("AE_MODEL_PATH", "~no-such-user/x", "AE_MODEL_PATH is '~no-such-user/x'"),
        ("FLUX2_CHECKPOINT", "flux", "no checkpoint called 'flux'. Choose one of: nano, nano-base, klein-4b"),
    ],
)
def test_values_that_are_not_allowed(variable: str, value: str, says: str) -> None:
    with pytest.raises(StudioError, match=re.escape(says)):
        Settings.from_environment({variable: value})


def test_unknown_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no checkpoint called 'klein'"):
        Settings(home=tmp_path).checkpoint("klein")
