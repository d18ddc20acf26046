"""What the environment can say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest

from flux2_studio.checkpoints import DEV
from flux2_studio.errors import RequestError, StudioError
from flux2_studio.settings import Settings


def test_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings.home == Path(platformdirs.user_data_dir("flux2-studio", appauthor=False))
    assert settings.outputs == settings.home / "outputs"
    assert settings.loras == settings.home / "loras"
    assert (settings.device, settings.dtype, settings.preview) == ("auto", "auto", "tiny")
    assert settings.default_checkpoint == "nano"
    assert settings.memory_limit_gb is None, "what is free"
    assert (settings.safety, settings.nsfw_model) == ("auto", None)
    assert settings.path_overrides == {}
    assert not settings.on_space
    assert settings.assets.is_dir()


def test_variables(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "FLUX2_HOME": str(tmp_path),
            "FLUX2_CHECKPOINT": "klein-4b",
            "FLUX2_LORAS_DIR": str(tmp_path / "models" / "loras"),
            "FLUX2_DEVICE": "cuda:1",
            "FLUX2_DTYPE": "bfloat16",
            "FLUX2_MEMORY": "7.5",
            "FLUX2_PREVIEW": "off",
            "FLUX2_SAFETY": "on",
            "FLUX2_UPSAMPLE": "local",
            "FLUX2_NSFW_MODEL_PATH": str(tmp_path / "nsfw"),
            "SPACE_ID": "someone/flux2-studio",
        }
    )
    assert settings.home == tmp_path
    assert settings.checkpoint(None).name == "klein-4b"
    assert settings.loras == tmp_path / "models" / "loras"
    assert (settings.device, settings.dtype, settings.preview) == ("cuda:1", "bfloat16", "off")
    assert settings.memory_limit_gb == 7.5
    assert (settings.safety, settings.nsfw_model) == ("on", tmp_path / "nsfw")
    assert settings.upsample == "local"
    assert settings.on_space


def test_who_signs(tmp_path: Path) -> None:
    settings = Settings.from_environment({"FLUX2_HOME": str(tmp_path)})
    assert (settings.c2pa_certificate, settings.c2pa_key) == (None, None)
    assert settings.identity == tmp_path / "identity"
    own = {"FLUX2_C2PA_CERTIFICATE": str(tmp_path / "chain.pem"), "FLUX2_C2PA_KEY": str(tmp_path / "key.pem")}
    settings = Settings.from_environment(own)
    assert (settings.c2pa_certificate, settings.c2pa_key) == (tmp_path / "chain.pem", tmp_path / "key.pem")


def test_what_the_watermark_says() -> None:
    assert Settings.from_environment({"FLUX2_WATERMARK_MESSAGE": ""}).watermark_message is None
    assert Settings.from_environment({"FLUX2_WATERMARK_MESSAGE": "studio-7"}).watermark_message == "studio-7"


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
    assert settings.path_overrides == {variable: Path.home() / "weights/file.safetensors"}
    assert Settings.from_environment({variable: ""}).path_overrides == {}


def test_an_empty_variable_counts_as_unset() -> None:
    own = (
        "TEXT_ENCODER_URL",
        "TEXT_ENCODER_TOKEN",
        "TEXT_ENCODER_FOR",
        "ENCODE_TOKEN",
        "OPENROUTER_URL",
        "OPENROUTER_MODEL",
        "HOME",
        "CHECKPOINT",
        "CHECKPOINTS_DIR",
        "LORAS_DIR",
        "DEVICE",
        "DTYPE",
        "QUANTIZE",
        "MEMORY",
        "PREVIEW",
        "SAFETY",
        "UPSAMPLE",
        "NSFW_MODEL_PATH",
    )
    names = ["OPENROUTER_API_KEY", *(f"FLUX2_{name}" for name in own)]
    assert Settings.from_environment(dict.fromkeys(names, "")) == Settings.from_environment({})


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("FLUX2_DTYPE", "float8", "FLUX2_DTYPE is 'float8'; set it to one of: auto, float32, bfloat16, float16"),
        ("FLUX2_QUANTIZE", "4", "FLUX2_QUANTIZE is '4'; set it to one of: off, fp8, int8"),
        ("FLUX2_COMPILE", "yes", "FLUX2_COMPILE is 'yes'; set it to one of: auto, on, off"),
        ("FLUX2_MEMORY", "8GB", "FLUX2_MEMORY is '8GB'; set it to a number of gigabytes, such as 7.5"),
        ("FLUX2_MEMORY", "0", "FLUX2_MEMORY is '0'; set it"),
        ("FLUX2_MEMORY", "-4", "FLUX2_MEMORY is '-4'; set it"),
        ("FLUX2_MEMORY", "nan", "FLUX2_MEMORY is 'nan'; set it"),
        ("FLUX2_MEMORY", "inf", "FLUX2_MEMORY is 'inf'; set it"),
        ("FLUX2_UPSAMPLE", "always", "FLUX2_UPSAMPLE is 'always'; set it to one of: none, local, openrouter"),
        ("FLUX2_SAFETY", "no", "FLUX2_SAFETY is 'no'; set it to one of: auto, on, warn, off"),
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


# --- a text encoder on another machine -------------------------------------------------------------------------------

ENCODER = {
    "FLUX2_TEXT_ENCODER_URL": "https://encoder.example:7870/predict?model=a",
    "FLUX2_TEXT_ENCODER_TOKEN": " secret-one\n",
    "FLUX2_ENCODE_TOKEN": "secret-two",
}


def test_a_remote_text_encoder() -> None:
    settings = Settings.from_environment(ENCODER)
    assert settings.text_encoder_url == "https://encoder.example:7870/predict?model=a"
    assert (settings.text_encoder_token, settings.encode_token) == ("secret-one", "secret-two")
    assert "secret" not in repr(settings)


def test_no_other_token_is_taken_for_it() -> None:
    settings = Settings.from_environment({"HF_TOKEN": "hf_secret", "FLUX2_TEXT_ENCODER_URL": "http://localhost:7870"})
    assert settings.text_encoder_token is None and settings.encode_token is None


def test_who_enhances_prompts() -> None:
    settings = Settings.from_environment({"OPENAI_API_KEY": "of another service"})
    assert (settings.openrouter_url, settings.openrouter_model) == ("https://openrouter.ai/api/v1", None)
    assert settings.openrouter_key is None
    own = {"FLUX2_OPENROUTER_URL": "http://localhost:11434/v1", "FLUX2_OPENROUTER_MODEL": "qwen3-vl:8b"}
    settings = Settings.from_environment({**own, "OPENROUTER_API_KEY": "sk-or-secret\n"})
    assert (settings.openrouter_url, settings.openrouter_model) == tuple(own.values())
    assert settings.openrouter_key == "sk-or-secret"
    assert "secret" not in repr(settings)


def test_who_has_the_same_text_encoder_reads_remotely() -> None:
    def remote(**more: str) -> set[str]:
        settings = Settings.from_environment({**ENCODER, **more})
        return {it.name for it in settings.checkpoints if settings.uses_remote_text_encoder(it)}

    assert remote() == {"dev"}
    assert remote(FLUX2_TEXT_ENCODER_FOR="klein-9b") == {"klein-9b", "klein-9b-kv", "klein-base-9b"}
    assert remote(FLUX2_TEXT_ENCODER_URL="") == set()
    own = replace(DEV, name="my-dev-q4", flow=replace(DEV.flow, repo=None, path="/files/my-dev-q4.gguf"))
    assert Settings.from_environment(ENCODER).uses_remote_text_encoder(own)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("FLUX2_TEXT_ENCODER_URL", "encoder.example", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "ftp://secret.example/", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "file:///etc/secret", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "http://", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "http://a:secret/", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "http://a:70000/", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "http://[secret/", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "http://a.example/se cret", "FLUX2_TEXT_ENCODER_URL is not an address"),
        ("FLUX2_TEXT_ENCODER_URL", "http://me:secret@a.example/", "holds a name or password"),
        ("FLUX2_TEXT_ENCODER_TOKEN", "sec\nret", "FLUX2_TEXT_ENCODER_TOKEN holds blanks or other characters"),
        ("FLUX2_ENCODE_TOKEN", "sec ret", "FLUX2_ENCODE_TOKEN holds blanks or other characters"),
        ("FLUX2_OPENROUTER_URL", "localhost:8000/v1", "FLUX2_OPENROUTER_URL is not an address"),
        ("OPENROUTER_API_KEY", "sec ret", "OPENROUTER_API_KEY holds blanks or other characters"),
        ("FLUX2_ENCODE_TOKEN", "secrét", "FLUX2_ENCODE_TOKEN holds blanks or other characters"),
        ("FLUX2_TEXT_ENCODER_FOR", "klein", "FLUX2_TEXT_ENCODER_FOR is 'klein'; set it to one of: nano"),
    ],
)
def test_what_is_no_address_or_token(variable: str, value: str, says: str) -> None:
    with pytest.raises(StudioError, match=re.escape(says)) as caught:
        Settings.from_environment({variable: value})
    assert not any(part in str(caught.value) for part in ("secret", "sec ret", "sec\nret", "secrét"))
