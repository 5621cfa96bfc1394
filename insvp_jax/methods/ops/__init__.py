"""Operations that several methods are built from."""
