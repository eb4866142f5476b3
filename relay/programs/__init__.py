"""The loops: who calls whom, in what order, and the reaction to each error."""
