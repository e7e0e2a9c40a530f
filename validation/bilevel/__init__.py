"""A zoo of bilevel problems with references in extended precision, for us and for a peer."""
