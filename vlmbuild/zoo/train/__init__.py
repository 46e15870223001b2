"""How the zoo's checkpoints are made: `python -m vlmbuild.zoo.train OUTPUT --family F`, a module for each family."""
