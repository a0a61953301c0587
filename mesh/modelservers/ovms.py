"""The configuration file of OpenVINO Model Server, which the server and its adapter share."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

FILE = "model_config_list.json"


def write(file: Path, models: Mapping[str, str]) -> None:
    """Writes the configuration file. `models` has the models' folders by their names. Raises OSError."""
    listed = [{"config": {"name": name, "base_path": path}} for name, path in models.items()]
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps({"model_config_list": listed}))
    fresh.chmod(0o644)  # OVMS may run as another user
    os.replace(fresh, file)


def prepare(folder: Path) -> None:
    """Writes an empty file into a folder if there is none, because OVMS does not start without one. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).exists():
        write(folder / FILE, {})
