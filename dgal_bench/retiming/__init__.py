"""The replay of a results folder: queries of finished cells timed again, alone, into files apart from the rows."""
