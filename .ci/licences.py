"""Prints, as Markdown, the licence of every package of this environment: what an installed pocketfusion needs."""

from importlib import metadata


def licence(about: metadata.PackageMetadata) -> str:
    """By the field of today, else the classifiers, else the field of yesterday if it is a name and not a text."""
    if found := about.get("License-Expression"):
        return found
    kinds = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    text = about.get("License") or ""
    return ", ".join(kinds) or (text if text and "\n" not in text and len(text) < 60 else "see the package")


print("# Licences of what an installed pocketfusion stands on\n\n| package | version | licence |\n|---|---|---|")
for one in sorted(metadata.distributions(), key=lambda one: one.metadata["Name"].lower()):
    if one.metadata["Name"] not in ("pip", "setuptools"):
        print(f"| {one.metadata['Name']} | {one.version} | {licence(one.metadata)} |")
print("\nThe page's own packages are listed, with their texts, in `licences.md` beside it; the weights' in NOTICE.")
