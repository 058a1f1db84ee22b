"""This file is the description of a model: frozen, validated dataclasses without any JAX.

A `ModelConfig` is a tuple of layers, and a layer is one attention and one feed-forward part. Layers which are
equal form a *kind* ("dense", "moe"); the parameters of one kind are stacked. Shape letters are those of the
README: D d_model, N query heads, K key-value heads, H head_dim, F d_ff, E experts, k experts per token.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.checks import check_choice, check_counts, check_even, check_numbers, check_part, short

QKNorm = Literal["none", "head", "full"]
AttentionBias = Literal["none", "qkv", "all"]
Score = Literal["softmax", "sigmoid"]
Gates = Literal["raw", "normalized"]
Balance = Literal["aux_loss", "bias", "none"]
SharedGate = Literal["none", "sigmoid"]
Embeddings = Literal["tied", "untied"]


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Causal attention with rotary positions; several query heads share one key-value head.

    Attributes:
      num_heads: N, query heads.
      num_kv_heads: K, key-value heads; divides num_heads.
      head_dim: H, even because rotary embedding turns pairs of features.
      rope_theta: base of the rotary wavelengths.
      qk_norm: RMS norm of queries and keys: "head" over H, one scale for all heads (Qwen3); "full" over all
        heads at once, a scale per feature (OLMoE).
      bias: which projections add a bias; "all" adds the output projection to query, key and value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    qk_norm: QKNorm = "none"
    bias: AttentionBias = "none"

    def __post_init__(self) -> None:
        check_counts(self, "num_heads", "num_kv_heads", "head_dim")
        check_numbers(self, "rope_theta")
        check_choice(self, "qk_norm", QKNorm)
        check_choice(self, "bias", AttentionBias)
        if self.num_heads % self.num_kv_heads:
            divisors = [count for count in range(1, self.num_heads + 1) if self.num_heads % count == 0]
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} key-value heads for "
                f"{self.num_heads} heads; use one of {divisors}"
            )
        check_even(self, "head_dim")

    @property
    def rotary(self) -> tuple[int, float]:
        """(H, theta): all that rotary positions depend on."""
        return self.head_dim, self.rope_theta


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1): priced, not yet a layer.

    Attributes:
      num_heads: N.
      q_rank: width of the compressed query; 0 projects queries directly.
      kv_rank: width of the compressed keys and values.
      nope_dim: features of a query or key head without position.
      rope_dim: features of a query head, and of the one shared key, with rotary position; even.
      v_dim: features of a value head.
      rope_theta: base of the rotary wavelengths.
    """

    num_heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        check_counts(self, "num_heads", "kv_rank", "nope_dim", "rope_dim", "v_dim")
        check_counts(self, "q_rank", at_least=0)
        check_numbers(self, "rope_theta")
        check_even(self, "rope_dim")


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """Feed-forward part that every token passes through.

    Attributes:
      d_ff: F, hidden width.
      num_matrices: 3 is SwiGLU (gate, up, down), 2 is GELU (up, down).
    """

    d_ff: int
    num_matrices: Literal[2, 3] = 3

    def __post_init__(self) -> None:
        check_counts(self, "d_ff")
        check_choice(self, "num_matrices", Literal[2, 3])


@dataclass(frozen=True, kw_only=True)
class Router:
    """How tokens choose experts. Everything is computed in at least float32.

    Attributes:
      score: what turns logits into scores.
      gates: "normalized" divides the k chosen scores by their sum, "raw" does not.
      scaling_factor: multiplies the gates last.
      balance: "aux_loss" adds a load-balancing loss; "bias" adds a bias, updated outside of the gradient, to
        the scores when choosing experts but not to the gates (arXiv:2408.15664); "none" does neither.
      aux_loss_coefficient: weight of the load-balancing loss, used when balance is "aux_loss".
      z_loss_coefficient: weight of mean(logsumexp(logits)^2) (ST-MoE, arXiv:2202.08906 section 3.3).
      bias_update_rate: step of the balancing bias, used when balance is "bias".
      num_groups: groups of consecutive experts; with several, a token chooses groups first (arXiv:2412.19437 section
        2.1.2), so that its experts are on few nodes.
      groups_per_token: groups that a token chooses; its k experts are the best of theirs.
      scored_per_group: best experts whose scores add up to that of their group: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
    """

    score: Score = "softmax"
    gates: Gates = "normalized"
    scaling_factor: float = 1.0
    balance: Balance = "aux_loss"
    aux_loss_coefficient: float = 0.01
    z_loss_coefficient: float = 0.0
    bias_update_rate: float = 0.001
    num_groups: int = 1
    groups_per_token: int = 1
    scored_per_group: int = 2

    def __post_init__(self) -> None:
        check_counts(self, "num_groups", "groups_per_token", "scored_per_group")
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"groups_per_token must not exceed num_groups, got {self.groups_per_token} of {self.num_groups} groups"
            )
        check_choice(self, "score", Score)
        check_choice(self, "gates", Gates)
        check_choice(self, "balance", Balance)
        check_numbers(self, "scaling_factor")
        coefficients = ("aux_loss_coefficient", "z_loss_coefficient", "bias_update_rate")
        check_numbers(self, *coefficients, zero="allowed")


@dataclass(frozen=True, kw_only=True)
class MoEFFN:
    """Feed-forward part of which every token passes through k of E experts.

    Attributes:
      num_experts: E, routed experts.
      experts_per_token: k, between 1 and E.
      d_ff: F, hidden width of one expert.
      num_matrices: 3 is SwiGLU, 2 is GELU; the same for routed, shared and residual parts.
      shared_d_ff: hidden width of all shared experts together; 0 for none.
      dense_residual_d_ff: hidden width of a dense part with its own norm beside the experts (Arctic), or 0.
      router: how tokens choose experts.
      shared_gate: "sigmoid" multiplies the shared experts by a learned gate per token (Qwen2-MoE).
    """

    num_experts: int
    experts_per_token: int
    d_ff: int
    num_matrices: Literal[2, 3] = 3
    shared_d_ff: int = 0
    dense_residual_d_ff: int = 0
    router: Router = field(default_factory=Router)
    shared_gate: SharedGate = "none"

    def __post_init__(self) -> None:
        check_counts(self, "num_experts", "experts_per_token", "d_ff")
        check_counts(self, "shared_d_ff", "dense_residual_d_ff", at_least=0)
        check_choice(self, "num_matrices", Literal[2, 3])
        check_choice(self, "shared_gate", SharedGate)
        check_part(self, "router", Router)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must not exceed num_experts, got {self.experts_per_token} of "
                f"{self.num_experts} experts; lower experts_per_token or raise num_experts"
            )
        if self.shared_gate == "sigmoid" and self.shared_d_ff == 0:
            raise ValueError(
                "shared_gate 'sigmoid' needs a shared expert, got shared_d_ff 0; set shared_d_ff"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        groups, chosen = self.router.num_groups, self.router.groups_per_token
        if self.num_experts % groups:
            raise ValueError(f"num_groups must divide the {self.num_experts} experts, got {groups} groups")
        inside = self.num_experts // groups
        if groups > 1 and inside < self.router.scored_per_group:
            raise ValueError(
                f"a group needs the {self.router.scored_per_group} experts that its score is made of, got {inside}; "
                "lower num_groups or scored_per_group"
            )
        if chosen * inside < self.experts_per_token:
            raise ValueError(
                f"the {self.experts_per_token} experts of a token must be in its {chosen} groups of {inside}, "
                "which is too few; raise groups_per_token"
            )


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One decoder layer: attention, then feed-forward, each after an RMS norm and with a residual."""

    attention: GroupedQueryAttention | LatentAttention
    ffn: DenseFFN | MoEFFN

    def __post_init__(self) -> None:
        check_part(self, "attention", GroupedQueryAttention, LatentAttention)
        check_part(self, "ffn", DenseFFN, MoEFFN)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
      name: what the model is called in logs and files.
      d_model: D.
      vocab_size: V.
      layers: one LayerConfig per layer, first layer first.
      embeddings: "tied" uses the embedding as output head.
      prediction_layers: layers beyond the last that predict one more token each (multi-token prediction, DeepSeek-V3,
        arXiv:2412.19437 section 2.2); each joins the stream with the embedding of the next token and is then a layer
        like the last; priced, not yet trained.
      norm_eps: added to the mean square in every RMS norm.
      init_std: standard deviation of the initial matrices; output projections divide it by sqrt(2 L).
    """

    name: str
    d_model: int
    vocab_size: int
    layers: tuple[LayerConfig, ...]
    embeddings: Embeddings = "untied"
    prediction_layers: int = 0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name of a ModelConfig must be a non-empty string, got {self.name!r}")
        check_counts(self, "d_model", "vocab_size")
        check_counts(self, "prediction_layers", at_least=0)
        check_numbers(self, "norm_eps", "init_std")
        check_choice(self, "embeddings", Embeddings)
        if not isinstance(self.layers, tuple) or not self.layers:
            raise ValueError(f"layers must be a non-empty tuple of LayerConfig, got {short(self.layers)}")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LayerConfig):
                raise ValueError(f"layers must hold LayerConfig only, got {short(layer)} at layer {index}")
        for name in ("num_experts", "experts_per_token"):
            found = {getattr(ffn, name) for ffn in self._moe_ffns()}
            if len(found) > 1:
                raise ValueError(
                    f"all MoE layers must agree on {name}, got {sorted(found)}; "
                    "router statistics are one table with a row per MoE layer"
                )

    def __hash__(self) -> int:
        # Prices are remembered by model, and hashing every layer each time would take longer than most of them.
        return hash((self.name, self.d_model, self.vocab_size, len(self.layers)))

    def _moe_ffns(self) -> list[MoEFFN]:
        return [layer.ffn for layer in self.layers if isinstance(layer.ffn, MoEFFN)]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def kinds(self) -> dict[str, LayerConfig]:
        """Distinct layers in order of first use, named "dense", "moe", then "dense_2", "moe_2" and so on."""
        kinds: dict[str, LayerConfig] = {}
        for layer in dict.fromkeys(self.layers):
            family = "moe" if isinstance(layer.ffn, MoEFFN) else "dense"
            count = 1 + sum(name.split("_")[0] == family for name in kinds)
            kinds[family if count == 1 else f"{family}_{count}"] = layer
        return kinds

    @property
    def kind_of_layer(self) -> tuple[str, ...]:
        """Name of the kind of every layer, length L."""
        names = {layer: name for name, layer in self.kinds.items()}
        return tuple(names[layer] for layer in self.layers)

    def layers_of_kind(self, kind: str) -> tuple[int, ...]:
        """Returns the indices of the layers of one kind, ascending: the order of its stacked parameters."""
        kinds = self.kind_of_layer
        if kind not in kinds:
            known = ", ".join(self.kinds)
            raise ValueError(f"model '{self.name}' has no layers of kind '{kind}'; it has {known}")
        return tuple(index for index, name in enumerate(kinds) if name == kind)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, ascending: the rows of router bias and load."""
        return tuple(index for index, layer in enumerate(self.layers) if isinstance(layer.ffn, MoEFFN))

    @property
    def num_experts(self) -> int:
        """E of every MoE layer, 0 without MoE layers."""
        return next((ffn.num_experts for ffn in self._moe_ffns()), 0)

    @property
    def experts_per_token(self) -> int:
        """Experts per token of every MoE layer, 0 without MoE layers."""
        return next((ffn.experts_per_token for ffn in self._moe_ffns()), 0)

    def check_trainable(self) -> None:
        """Refuses what can be described and priced, but has no layer yet.

        Raises:
          ValueError: if the model has latent attention or prediction layers.
        """
        for layer in self.layers:
            if not isinstance(layer.attention, GroupedQueryAttention):
                raise ValueError(
                    f"model '{self.name}' uses {type(layer.attention).__name__}, which can be planned but not yet "
                    "trained; choose a model with GroupedQueryAttention"
                )
        if self.prediction_layers:
            raise ValueError(
                f"model '{self.name}' has {self.prediction_layers} prediction_layers, which can be planned but not yet "
                "trained; set prediction_layers to 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON value; runs of equal layers are written once with their "repeat"."""
        value = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        value["layers"] = [
            {
                "repeat": len(list(run)),
                "attention": _part_to_dict(layer.attention),
                "ffn": _part_to_dict(layer.ffn),
            }
            for layer, run in itertools.groupby(self.layers)
        ]
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ModelConfig":
        """Builds the configuration that `to_dict` wrote, exactly.

        Raises:
          ValueError: for a missing, unknown or impossible field; the sentence names it.
        """
        fields = _fields_of(cls, value, where="model")
        runs = fields["layers"]
        if not isinstance(runs, list | tuple):
            raise ValueError(f"model.layers must be a list of layers, got {short(runs)}")
        layers = [_layers_from_dict(run, where=f"model.layers[{index}]") for index, run in enumerate(runs)]
        fields["layers"] = tuple(itertools.chain.from_iterable(layers))
        return cls(**fields)


_ATTENTION_TYPES = {"grouped_query": GroupedQueryAttention, "latent": LatentAttention}
_FFN_TYPES = {"dense": DenseFFN, "moe": MoEFFN}
_TYPE_NAMES = {cls: name for name, cls in (_ATTENTION_TYPES | _FFN_TYPES).items()}


def _part_to_dict(part: Any) -> dict[str, Any]:
    return {"type": _TYPE_NAMES[type(part)]} | dataclasses.asdict(part)


def _layers_from_dict(value: Any, *, where: str) -> list[LayerConfig]:
    """Returns one run of equal layers."""
    rest = dict(value) if isinstance(value, Mapping) else value
    repeat = rest.pop("repeat", 1) if isinstance(rest, dict) else 1
    if type(repeat) is not int or repeat < 1:
        raise ValueError(f"{where}.repeat must be a whole number of at least 1, got {repeat!r}")
    fields = _fields_of(LayerConfig, rest, where=where)
    attention = _part_from_dict(_ATTENTION_TYPES, fields["attention"], where=f"{where}.attention")
    ffn = _part_from_dict(_FFN_TYPES, fields["ffn"], where=f"{where}.ffn")
    return [LayerConfig(attention=attention, ffn=ffn)] * repeat


def _part_from_dict(types: Mapping[str, type], value: Any, *, where: str) -> Any:
    """Builds the attention or feed-forward part that the key "type" names."""
    if not isinstance(value, Mapping) or "type" not in value:
        raise ValueError(f"{where} must be an object with a 'type' ({', '.join(types)}), got {short(value)}")
    if value["type"] not in types:
        raise ValueError(f"{where}.type must be one of {', '.join(types)}, got {value['type']!r}")
    cls = types[value["type"]]
    fields = _fields_of(cls, {key: item for key, item in value.items() if key != "type"}, where=where)
    if "router" in fields:
        fields["router"] = Router(**_fields_of(Router, fields["router"], where=f"{where}.router"))
    return cls(**fields)


def _fields_of(cls: type, value: Any, *, where: str) -> dict[str, Any]:
    """Returns the keyword arguments for `cls`, after checking that each exists and none is missing."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, got {short(value)}")
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    for name in value:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has no field '{name}'; did you mean '{nearest}'?")
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if name not in value and required:
            found = ", ".join(map(str, value)) or "none"
            raise ValueError(f"{where} needs the field '{name}'; it has {found}")
    return dict(value)
