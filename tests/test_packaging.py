"""What stands in more than one file is the same in all of them."""

import re
import tomllib
from pathlib import Path

import pytest

import sthisto

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="not in a checkout")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_comes_from_one_place(project):
    assert project["project"]["dynamic"] == ["version"]
    assert "version" not in project["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == sthisto.__version__


def test_extra_and_group_of_the_tests_are_alike(project):
    assert project["project"]["optional-dependencies"]["test"] == project["dependency-groups"]["test"]


def test_dependencies_have_a_lowest_version_that_can_be_tested(project):
    extras = [each for names in project["project"]["optional-dependencies"].values() for each in names]
    groups = [each for names in project["dependency-groups"].values() for each in names if isinstance(each, str)]
    assert [each for each in project["project"]["dependencies"] + extras + groups if ">=" not in each] == []


def test_the_license_is_the_same_everywhere(project):
    license = project["project"]["license"]
    for file in ("CITATION.cff", ".github/ecosystem/meta.yaml", "README.md"):
        assert license in (ROOT / file).read_text(), file
    assert "BSD 3-Clause" in (ROOT / "LICENSE").read_text()


def test_types_are_handed_on():
    assert (Path(sthisto.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(workflow):
    for line in re.findall(r"uses: (.+)", workflow.read_text()):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v[\d.]+", line), line


def test_every_python_that_is_promised_is_tested(project):
    promised = {each.rsplit(" ", 1)[1] for each in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", each)}
    tested = set(re.findall(r'python: "(3\.\d+)"', (ROOT / ".github/workflows/test.yml").read_text()))
    assert tested == promised == set(project["tool"]["hatch"]["envs"]["hatch-test"]["matrix"][0]["python"])
    assert project["project"]["requires-python"] == f">={min(promised, key=lambda each: int(each.split('.')[1]))}"


def test_the_readme_has_the_two_commands_that_ci_runs():
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    assert len(blocks[0].strip().splitlines()) == 2
