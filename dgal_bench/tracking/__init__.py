"""The W&B mirror: runs made from results files, while they are written and afterwards. The files are the only truth."""
