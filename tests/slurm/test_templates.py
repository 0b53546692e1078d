"""Templates of job scripts, which a folder may replace: that they win, and which of them are refused."""

from __future__ import annotations

import subprocess

import pytest
from support.runs import ROOT

pytestmark = pytest.mark.slow

DRY = "--dry-run"


@pytest.fixture
def write_template(desk):
    """Writes ./launch/NAME from the installed one, with the first `old` replaced, or with `new` at its end."""

    def write_template(name: str, *, old: str = "", new: str = "") -> None:
        (desk.folder / "launch").mkdir(exist_ok=True)
        text = (ROOT / "launch" / name).read_text()
        assert old in text

        # Bytes: no line end is to change.
        (desk.folder / "launch" / name).write_bytes((text.replace(old, new, 1) if old else text + new).encode())

    return write_template


def test_templates_of_the_current_folder_win(write_template, desk, submit):
    write_template("train.sbatch", old="{{OPTIONS}}\n", new="#SBATCH --mail-type=END\n{{OPTIONS}}\n")
    write_template("job.sh", new="\nsay 'a line of ours: {{ }} {{a,b},c}'\n")
    desk.write_site(
        "PARTITION=fast\nACCOUNT='a b'\nQOS=\nCPUS_PER_TASK=7\nsetup() { module load ours; }\nPYTHON=/x/python\n"
    )
    status, script, err = submit(DRY)
    assert (status, err) == (0, "")

    for line in ("--mail-type=END", "--partition=fast", "--account=a b", "--cpus-per-task=7"):
        assert f"#SBATCH {line}\n" in script

    assert "--qos" not in script
    assert "# ---- launch/site.env\nPARTITION=fast\n" in script
    assert "say 'a line of ours" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("name", "old", "new", "got"),
    [
        ("train.sbatch", "{{SITE}}", "{{SITES}}", "{{SITES}}"),
        ("train.sbatch", "#!/bin/bash", "# a job", "# a job"),
        ("train.sbatch", "#!/bin/bash", "\n#!/bin/bash", ""),
        ("train.sbatch", "#!/bin/bash\n", "#!/bin/bash\r\n", "DOS line ends"),
        ("job.sh", "set -uo pipefail\n", "set -uo pipefail\r\n", "DOS line ends"),
        ("site.env", 'QOS=""\n', 'QOS=""\r\n', "DOS line ends"),
        ("train.sbatch", "#SBATCH --nodes", "cd /\n#SBATCH --nodes", "in line 6, after the first command in line 5"),
        ("site.env", "setup() {", "setup( {", "syntax error"),
        ("site.env", 'QOS=""', "QOS='a\nb'", "values of several lines"),
        ("site.env", 'QOS=""', "exit 3", "values of several lines"),
    ],
)
def test_a_broken_template_is_named(name, old, new, got, write_template, desk, submit):
    write_template(name, old=old, new=new)
    before = desk.files()
    status, out, err = submit(DRY)
    assert (status, out) == (2, "")
    assert err.startswith(f"megatron-mea: error: launch/{name}\n  got:      ")
    assert got in err
    assert desk.files() == before


def test_what_a_site_prints_is_not_in_the_script(desk, submit):
    desk.write_site("echo 'welcome'\nPARTITION=fast\nsetup() { :; }\n")
    status, script, _ = submit(DRY)
    assert status == 0
    assert script.startswith("#!/bin/bash")
    assert "#SBATCH --partition=fast\n" in script
