"""Puts assets/ and presets/ into the wheel, inside the package; everything else stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads them where they are
            for name in ("assets", "presets"):
                self.copy_tree(name, str(Path(self.build_lib) / "flux2_studio" / name))


setup(cmdclass={"build_py": BuildWithData})
