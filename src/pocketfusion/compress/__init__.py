"""`pocketfusion compress`: every stage of a recipe in order, each skipped, resumed or made as its inputs ask."""
