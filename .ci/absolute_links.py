"""absolute_links.py TREE URL: the README's relative links and pictures as addresses there, and project.urls."""

import re
import sys
from pathlib import Path

tree, url = Path(sys.argv[1]), sys.argv[2].rstrip("/")
project = (tree / "pyproject.toml").read_text()
version = re.search(r'^version = "(.*)"', project, re.M)[1]


def absolute(found: re.Match[str]) -> str:
    """`](docs/x.md#y)`; pictures are asked for as they are, pages as they are shown."""
    mark, target = found["mark"], found["target"]
    if not (tree / target.partition("#")[0]).exists() and not target.startswith("models/"):
        sys.exit(f"README.md leads to {target}, which is not there")
    return f"{mark}[{found['text']}]({url}/{'raw' if mark else 'blob'}/v{version}/{target})"


readme = tree / "README.md"
link = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^][]|\[[^]]*\])*)\]\((?P<target>(?!https?:|#|mailto:)[^)\s]+)\)")
readme.write_text(link.sub(absolute, readme.read_text()))
urls = {"Repository": url, "Documentation": f"{url}/tree/v{version}/docs", "Issues": f"{url}/issues"}
urls["Changelog"] = f"{url}/blob/v{version}/CHANGELOG.md"
lines = "".join(f'{name} = "{address}"\n' for name, address in urls.items())
(tree / "pyproject.toml").write_text(
    project.replace("\n[project.scripts]", f"\n[project.urls]\n{lines}\n[project.scripts]")
)
