"""Plans: every stage's program compiled ahead of time for devices that are not here, and what the compiler says of it.

command.py prints them; programs.py says what the stages run, topology.py for which devices, compiler.py what it takes.
"""
