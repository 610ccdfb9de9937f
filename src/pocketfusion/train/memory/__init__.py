"""What a step of training needs of memory, and what makes it fit."""
