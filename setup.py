"""What setup.cfg cannot say: the job templates of launch/ install with the package, as megatron_mea/launch/."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TEMPLATES = ("train.sbatch", "sweep.sbatch", "prepare.sbatch", "job.sh", "site.env")


class BuildWithTemplates(build_py):
    def run(self) -> None:
        super().run()
        # An editable install finds them beside the package.
        if not self.editable_mode:
            folder = Path(self.build_lib, "megatron_mea", "launch")
            self.mkpath(str(folder))
            for name in TEMPLATES:
                self.copy_file(f"launch/{name}", str(folder / name))


setup(cmdclass={"build_py": BuildWithTemplates})
