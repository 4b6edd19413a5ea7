"""A fuzzer of edge-ft's commands: `make fuzz`, `make fuzz-planted`, and a few hundred cases in `make test`.

It mutates what a user or a stranger's file can bring, runs a command on it in a child process with limits, and holds
that the command ends with 0 or with one sentence of refusal, and changes nothing outside its output folder.
"""
