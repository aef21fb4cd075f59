"""What is measured: the scenes and their facts, metrics, the judge and the benchmark."""
