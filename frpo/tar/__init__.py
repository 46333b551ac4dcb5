"""TAR, tamper-resistant safeguards (arXiv 2408.00761): a baseline that trains against simulated attacks."""
