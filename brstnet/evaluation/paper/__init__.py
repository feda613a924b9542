"""The paper's tables and figures, its printed values beside ours."""
