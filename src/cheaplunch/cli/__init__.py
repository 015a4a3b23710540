"""The verbs of the command line, by what they are for, each with its flags below it. The only room that prints."""
