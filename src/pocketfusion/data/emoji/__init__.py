"""The captioned emoji data set: open-licensed drawings in eight styles, built from pinned packages."""
