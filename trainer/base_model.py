"""Where the weights of a model lie that is not the embedded one: what is learned on, whoever serves it."""

from pathlib import Path

from sia_events.shared.providers import split_model


def base_folder(home: Path, model: str) -> Path:
    """The Hugging Face folder of `model`, provider/name, as somebody has put it under `home`."""
    return home / "models" / split_model(model)[1]


def lacks(home: Path, model: str) -> str | None:
    """What has to be done before `model` can be learned on; None where it can be."""
    folder = base_folder(home, model)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return None
    return f"its weights are not here. Put its Hugging Face folder, or a link to it, at {folder}"
