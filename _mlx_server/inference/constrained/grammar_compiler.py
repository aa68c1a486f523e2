"""Compiles grammars for one model's tokenizer."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from _mlx_server.inference.prompt.control_tokens import alternatives
from _mlx_server.inference.prompt.tokenizer import TextTokenizer
from _mlx_server.inference.protocol import InvalidRequest, first_line


class GrammarCompiler:
    """Compiles grammars with llguidance for one model's tokenizer.

    Every method raises InvalidRequest if that package is not installed or does not support the
    tokenizer."""

    MAX_LENGTH = 1_000_000  # characters of a grammar
    MAX_STATES = 50_000  # of a grammar's lexer, at one or two KB

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer

    @functools.cached_property
    def _llguidance_tokenizer(self) -> Any:
        try:
            from llguidance import LLTokenizer

            return LLTokenizer(
                self._tokenizer.wrapped.backend_tokenizer.to_str(),
                eos_token=sorted(self._tokenizer.end_tokens),
            )
        except ImportError:
            raise InvalidRequest(
                'structured output needs one more package: pip install "mlx-server[constrained]"'
            ) from None
        except (AttributeError, ValueError) as error:
            raise InvalidRequest(
                f"this model's tokenizer does not allow structured output: {first_line(error)}"
            ) from error

    def matcher(self, grammar: str) -> Any:
        """An llguidance.LLMatcher at the beginning of a grammar in llguidance's form of Lark. Its
        `is_error` tells whether the grammar could not be compiled."""
        if len(grammar) > self.MAX_LENGTH:
            raise InvalidRequest(f"its grammar has more than {self.MAX_LENGTH} characters")
        tokenizer = self._llguidance_tokenizer
        from llguidance import LLMatcher, LLParserLimits

        # With forcing, text that the grammar demands would be tokenised as a whole, and what it
        # spells might become a special token.
        grammar = '%llguidance {"no_forcing": true}\n' + grammar
        limits = LLParserLimits(max_lexer_states=self.MAX_STATES)
        return LLMatcher(
            tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits
        )

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, none of which is a special token."""
        tokens: list[int] = self._llguidance_tokenizer.tokenize_str(text)
        return tokens

    def literal(self, text: str) -> str:
        """An expression for a text in a grammar. Where the text has special tokens, these tokens
        have to be generated; plain text that only looks like them does not match."""
        is_special = self._llguidance_tokenizer.is_special_token
        names = {
            name: f"<[{id}]>"
            for id, name in self._tokenizer.special_token_names().items()
            if is_special(id)
        }
        pieces = filter(None, re.split(f"({alternatives(names)})", text))
        terms = [names.get(piece) or json.dumps(piece, ensure_ascii=False) for piece in pieces]
        return " ".join(terms) or '""'
