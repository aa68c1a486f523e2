"""The agents that can be launched: how each is told to use a server."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from _mlx_server.inference.protocol import EngineError

# Tokens of Claude Code's first prompt (12,000) and of the end of the window (13,000) at which it
# compacts, beside those that an answer may have
CLAUDE_OWN_TOKENS = 25_000
ENOUGH_CONTEXT = 64_000  # tokens of a window; smaller ones leave little to a conversation
MAX_OUTPUT = 32_000  # tokens of an answer, what Claude Code asks for by itself
TIERS = ("opus", "sonnet", "haiku", "fable")
# With these it would ask another vendor's servers
_CLOUDS = ("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY")
# Whoever gives one of these has chosen how tool calls are permitted
_PERMISSIONS = (
    "--permission-mode",
    "--dangerously-skip-permissions",
    "--allow-dangerously-skip-permissions",
)


@dataclass(frozen=True)
class Target:
    """The server and model that an agent is to use, which may see images. `context` is in tokens,
    `max_tokens` the most of an answer, `tiers` the models that stand for Claude's, by TIERS."""

    url: str
    key: str | None
    model: str
    context: int
    max_tokens: int | None = None
    tiers: dict[str, str] = field(default_factory=dict)
    sees: bool = False

    @property
    def max_output(self) -> int:
        """Tokens of an answer that leave most of the window to the conversation."""
        return min(filter(None, [MAX_OUTPUT, self.context // 8, self.max_tokens]))


@dataclass(frozen=True)
class Agent:
    """A program of another vendor. `install` is that vendor's own command. `variables` are set for
    it, and `flags` precede what the user gives."""

    program: str
    title: str
    install: str
    variables: Callable[[Target], dict[str, str]]
    flags: Callable[[Target, Sequence[str]], list[str]]

    def find(self) -> str:
        """The path of the program. Raises EngineError with the command that installs it."""
        path = shutil.which(self.program)
        if path is None:
            raise EngineError(f"{self.title} is not installed; to install it: {self.install}")
        return path

    def line(self, target: Target, words: Sequence[str]) -> str:
        """The shell command that starts the program with the variables, for itself alone."""
        variables = [f"{name}={value}" for name, value in self.variables(target).items()]
        env = ["env", *variables] if variables else []
        program = shutil.which(self.program) or self.program
        return shlex.join([*env, program, *self.flags(target, words), *words])


def claude_variables(target: Target) -> dict[str, str]:
    """https://code.claude.com/docs/en/settings#environment-variables"""
    variables: dict[str, str | int] = {
        "ANTHROPIC_BASE_URL": target.url,
        # Without one it asks for a login
        "ANTHROPIC_AUTH_TOKEN": target.key or "none",
        "ANTHROPIC_API_KEY": "",  # a real one is none of ours
        **dict.fromkeys(_CLOUDS, ""),
        "ANTHROPIC_MODEL": target.model,
        **{f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL": name for tier, name in target.tiers.items()},
        "ANTHROPIC_SMALL_FAST_MODEL": target.tiers["haiku"],
        "CLAUDE_CODE_SUBAGENT_MODEL": target.model,
        # The installed models in its /model menu
        "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": 1,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": 0,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": target.context,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": target.max_output,
        "API_TIMEOUT_MS": 3_000_000,
        "API_FORCE_IDLE_TIMEOUT": 0,
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": 900_000,
    }
    if not importlib.util.find_spec("llguidance"):
        # Titles are asked for as structured output
        variables["CLAUDE_CODE_DISABLE_TERMINAL_TITLE"] = 1
    return {name: str(value) for name, value in variables.items()}


def claude_window(target: Target) -> str | None:
    """What is to be said of a window that leaves little to a conversation, None for a larger
    one."""
    if target.context >= ENOUGH_CONTEXT:
        return None
    left = max(0, target.context - target.max_output - CLAUDE_OWN_TOKENS) // 100 * 100
    return (
        f"{target.model} reads at most {target.context:,} tokens; Claude Code's own prompt and "
        f"reserves leave {left:,} of them to the conversation"
    )


def _claude_flags(target: Target, words: Sequence[str]) -> list[str]:
    """In its mode "auto" Anthropic's servers would have to check tool calls."""
    chosen = any(word.partition("=")[0] in _PERMISSIONS for word in words)
    return [] if chosen else ["--permission-mode", "acceptEdits"]


def _codex_variables(target: Target) -> dict[str, str]:
    return {"MLX_SERVER_API_KEY": target.key} if target.key else {}


def _codex_flags(target: Target, words: Sequence[str]) -> list[str]:
    """https://developers.openai.com/codex/config-reference; JSON's strings are TOML's as well."""
    key = ', env_key="MLX_SERVER_API_KEY"' if target.key else ""
    url = json.dumps(f"{target.url}/v1")
    provider = f'{{name="mlx-server", base_url={url}, wire_api="responses"{key}}}'
    settings = {
        "model_providers.mlx": provider,
        "model_provider": '"mlx"',
        "model": json.dumps(target.model, ensure_ascii=False),
        "model_context_window": str(target.context),
    }
    return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]


def _opencode_variables(target: Target) -> dict[str, str]:
    """https://opencode.ai/docs/config, https://opencode.ai/docs/providers"""
    model = {
        "name": target.model,
        "tool_call": True,
        "attachment": target.sees,
        "modalities": {"input": ["text", *["image"] * target.sees], "output": ["text"]},
        "limit": {"context": target.context, "output": target.max_output},
    }
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "mlx-server",
        "options": {"baseURL": f"{target.url}/v1", "apiKey": target.key or "none"},
        "models": {target.model: model},
    }
    name = f"mlx/{target.model}"
    config = {
        "provider": {"mlx": provider},
        "model": name,
        "small_model": name,
        "enabled_providers": ["mlx"],  # its menu and its agents cannot choose a vendor's model
    }
    return {
        "OPENCODE_CONFIG_CONTENT": json.dumps(config),
        "OPENCODE_DISABLE_MODELS_FETCH": "1",  # the list of vendors' models
    }


AGENTS = {
    "claude": Agent(
        "claude",
        "Claude Code",
        "curl -fsSL https://claude.ai/install.sh | bash",
        claude_variables,
        _claude_flags,
    ),
    "codex": Agent(
        "codex",
        "Codex",
        "npm install -g @openai/codex",
        _codex_variables,
        _codex_flags,
    ),
    "opencode": Agent(
        "opencode",
        "opencode",
        "curl -fsSL https://opencode.ai/install | bash",
        _opencode_variables,
        lambda target, words: [],
    ),
}
