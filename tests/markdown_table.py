"""Reads a Markdown table back."""


def cells(table: str) -> list[list[str]]:
  """Returns the rows of a table, the titles first, without its line of dashes."""
  lines = [line for line in table.splitlines() if line.startswith("|")]
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
  return [rows[0], *rows[2:]]
