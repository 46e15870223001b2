"""How the zoo's checkpoints are made: `python -m tests.zoo_training OUTPUT --family F`, a module for each family."""
