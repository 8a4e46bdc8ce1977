"""Any encoder: load, probe, blocks and hidden states, cut; which layers read a parameter; the word
pieces kept.

Letters as in model.py: B batch, T tokens, D hidden size. Layer 0 is the embedding output, layer k
the output of block k, counted from 1.
"""

import copy

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError
from transformers import AutoModel

from lib.hub import model_folder
from lib.messages import UserError, first_line

# what transformers raises for an encoder that cannot be built, or run on token ids and a mask
ENCODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,  # DeBERTa without a block
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


# --- layers ---------------------------------------------------------------------------------------


def blocks(encoder):
    """The encoder's nn.ModuleList of transformer blocks; layer k is block k - 1 of it."""
    count = getattr(encoder.config, "num_hidden_layers", None)
    lists = {}
    for name, module in encoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            lists[name] = module
    if len(lists) != 1:
        raise UserError(
            f"{type(encoder).__name__} is no encoder that can be used here: it has {len(lists)} "
            f"lists of {count} blocks, where BERT has one"
        )
    return next(iter(lists.values()))


def hidden_states(encoder, batch):
    """All layers' states of a batch, embeddings first: a tuple of (B, T, D).

    Returns transformers' own output, too.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if getattr(encoder.config, "type_vocab_size", 0) > 1:  # XLM-R has one, DistilBERT takes none
        inputs["token_type_ids"] = batch["token_type_ids"]
    output = encoder(**inputs, output_hidden_states=True)
    if not output.hidden_states:  # no blocks: the embeddings alone
        return (output.last_hidden_state,), output
    return output.hidden_states, output


def check_layers(layers, count, flag):
    """UserError unless `layers` are different numbers from 0 to `count`."""
    for layer in layers:
        if not 0 <= layer <= count:
            raise UserError(f"{flag} {layer}: the model has layers 0 (embeddings) to {count}")
    if len(set(layers)) < len(layers):
        raise UserError(f"{flag} {' '.join(map(str, layers))}: a layer is named twice")


# --- loading --------------------------------------------------------------------------------------


def load_encoder(name):
    """Load an encoder, a folder or a hub name, in float32 whatever its file holds.

    Reads safetensors alone and runs no code of the model's. Returns the encoder and whether it has
    a pretrained pooler. UserError when it cannot be had, lacks weights, or cannot be used: see
    probe().
    """
    folder = model_folder(name)
    try:
        encoder, info = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # said below, and not in a report that nobody sees
            output_loading_info=True,
        )
    except ENCODER_ERRORS as error:
        reason = first_line(error)
        raise UserError(f"no encoder can be loaded from {str(name)!r}: {reason}") from None
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        if missing:
            reason = missing[0]
        else:
            reason = f"shapes differ, {min(info['mismatched_keys'])[0]}"
        if info["unexpected_keys"]:
            reason += f"; the file has names as {min(info['unexpected_keys'])}"
        kind = type(encoder).__name__
        raise UserError(f"{str(name)!r} lacks weights of {kind}: {reason}")
    probe(encoder)
    pooler = getattr(encoder, "pooler", None)
    return encoder, pooler is not None and not info["missing_keys"]


def drop_pooler(encoder):
    """Take out a pooler that nobody reads, so that it is not trained, saved or counted."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = nn.Identity()  # and not None, which LayoutLM would call


def probe_batch(encoder):
    """Two rows of nine tokens and four of padding, (2, 13), that differ in the last token alone."""
    pad = encoder.config.pad_token_id or 0
    count = min(encoder.get_input_embeddings().num_embeddings, 30)
    row = [token for token in range(count) if token != pad][-9:]
    other = [*row[:-1], row[0]]
    ids = torch.tensor([row + [pad] * 4, other + [pad] * 4], device=encoder.device)
    mask = (ids != pad).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@torch.no_grad()
def probe(encoder):
    """The states of a small batch, dropout off: what an encoder is known by.

    UserError, with its class, where it cannot be used here: its states are not those of its blocks,
    padding changes them, or the first token's do not see the last one.
    """
    training = encoder.training
    encoder.eval()
    count = len(blocks(encoder))
    problem = None
    try:
        batch = probe_batch(encoder)
        unpadded = {key: value[:1, :9] for key, value in batch.items()}
        states, _ = hidden_states(encoder, batch)
        states_unpadded, _ = hidden_states(encoder, unpadded)
    except ENCODER_ERRORS as error:  # it wants a language for each row, a decoder's input, ...
        problem = f"cannot be run on token ids and a mask alone ({first_line(error)})"
    else:
        shape = (2, 13, encoder.config.hidden_size)
        if len(states) != count + 1:
            problem = f"gives {len(states)} hidden states for {count} blocks"
        elif any(layer.shape != shape for layer in states):
            problem = "gives hidden states of other shapes than (rows, tokens, hidden size)"
        elif any(map(differ, states, states_unpadded)):
            problem = "gives other states where a row is padded"
        elif count and torch.equal(states[-1][0, 0], states[-1][1, 0]):
            problem = "lets the first token not see the last one (it reads from left to right?)"
    finally:
        encoder.train(training)
    if problem:
        name = type(encoder).__name__
        raise UserError(f"{name} is no encoder that can be used here: it {problem}")
    return states


def differ(padded, unpadded):
    """Whether padding changes a layer's states: (2, 13, D) of probe_batch(), (1, 9, D) of its first
    row alone. Kernels differ by 1e-6, approximations by 3e-4 or more."""
    gap = (padded[:1, :9] - unpadded).norm(dim=2)
    return (gap > 1e-4 * unpadded.norm(dim=2)).any()


# --- cutting --------------------------------------------------------------------------------------


def cut_after(encoder, layer):
    """Drop the blocks above `layer`: nothing that reads layers up to it can see the difference.

    Where something runs after the last block (a norm, in pre-norm encoders) it must not run after
    this layer: then one block more is kept, whose output nobody reads. What is left must be what
    its configuration builds, for it is saved. Returns how many blocks are left.
    """
    expected = probe(encoder)[: layer + 1]
    stack = blocks(encoder)
    whole = list(stack)
    per_block = {}  # the configuration's lists with an entry for each block, as layer_types
    for key, value in vars(encoder.config).items():
        if isinstance(value, list) and len(value) == len(whole):
            per_block[key] = value
    for count in sorted({layer, min(layer + 1, len(whole)), len(whole)}):
        del stack[:]
        stack.extend(whole[:count])
        encoder.config.num_hidden_layers = count  # DistilBERT's n_layers is an alias of it
        for key, value in per_block.items():
            setattr(encoder.config, key, value[:count])
        try:
            rebuilt = type(encoder).from_pretrained(
                None, config=copy.deepcopy(encoder.config), state_dict=encoder.state_dict()
            )
            same_when_cut = equal_layers(expected, probe(encoder))
            same_when_loaded = equal_layers(expected, probe(rebuilt))
        except (UserError, *ENCODER_ERRORS):
            continue
        if same_when_cut and same_when_loaded:
            return count
    name = type(encoder).__name__
    raise UserError(f"{name} cannot be saved and loaded again with the same states")


def equal_layers(expected, states):
    """Whether the lowest layers' states are `expected`, bit for bit."""
    return all(map(torch.equal, expected, states[: len(expected)]))


# --- freezing -------------------------------------------------------------------------------------


def parameter_layers(encoder, top):
    """Which layers up to `top` read each parameter, by name: {name: (first, last)}.

    Those of block k are read by layer k, those that blocks share by all of theirs. Of any other
    (embeddings, a projection beside them, relative positions, a last norm) the first reader is the
    lowest layer whose states depend on it; where that is layer 0 it is the only one, else every
    layer above counts as a reader, too. Parameters that no layer up to `top` reads, as BERT's
    pooler, are left out.
    """
    in_blocks = {}
    for k, block in enumerate(blocks(encoder), 1):
        for parameter in block.parameters():
            first, _ = in_blocks.get(parameter, (k, k))  # blocks may share one
            in_blocks[parameter] = first, k
    readers = {}
    for name, parameter in encoder.named_parameters():
        if parameter in in_blocks:
            first, last = in_blocks[parameter]
        else:
            first = first_reader(encoder, parameter)
            last = 0 if first == 0 else top
        if first is not None and first <= top:
            readers[name] = first, min(last, top)
    return readers


def first_reader(encoder, parameter):
    """The lowest layer whose states have a gradient for a parameter, or None."""
    trained = [other for other in encoder.parameters() if other.requires_grad]
    encoder.requires_grad_(False)
    parameter.requires_grad = True
    states, _ = hidden_states(encoder, probe_batch(encoder))
    parameter.requires_grad = False
    for other in trained:
        other.requires_grad = True
    for k, layer in enumerate(states):
        if layer.requires_grad:
            return k
    return None


# --- token ids and the table of word embeddings ---------------------------------------------------


def token_limit(encoder):
    """Tokens that a row may have: the table of positions less what padding takes of it, or what the
    configuration says."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name:
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    limit = getattr(encoder.config, "max_position_embeddings", 0)
    return limit if limit > 0 else 1 << 20


def check_length(encoder, max_length):
    """UserError when rows of `max_length` tokens do not fit the encoder's positions."""
    limit = token_limit(encoder)
    if not 3 <= max_length <= limit:
        raise UserError(
            f"--max-length {max_length}: expected 3 to {limit}, the positions this encoder has"
        )


def check_tokens(encoder, ids):
    """UserError when a token id of an array is not in the encoder's table."""
    count = encoder.get_input_embeddings().num_embeddings
    if ids.max() >= count:
        raise UserError(
            f"the tokenizer gives token {ids.max()}, the encoder knows {count:,}: was "
            "resize_token_embeddings() forgotten?"
        )


def keep_tokens(encoder, ids, pad_id):
    """Shrink the table of word embeddings to the rows that the token `ids` use, and the first ones
    up to [PAD], so that it keeps its id.

    The others would get no gradient and stay as they are; yet Adam, clipping and the gradient
    itself would go over them at every step. whole_state() puts them back. Returns the new id of
    each old one, (V,) int32.
    """
    check_tokens(encoder, ids)
    table = encoder.get_input_embeddings()  # of any class: some scale what they look up
    used = np.zeros(table.num_embeddings, dtype=bool)
    used[ids] = True
    used[: max(pad_id, table.padding_idx or 0) + 1] = True
    encoder.kept_rows = torch.from_numpy(np.flatnonzero(used))
    encoder.whole_table = table.weight.detach().cpu()
    rows = encoder.whole_table[encoder.kept_rows].to(table.weight.device)
    table.weight = nn.Parameter(rows, table.weight.requires_grad)
    table.num_embeddings = len(rows)
    return (np.cumsum(used) - 1).astype(np.int32)


def whole_state(encoder):
    """The encoder's state_dict with all rows of the word embeddings."""
    state = encoder.state_dict()
    if hasattr(encoder, "whole_table"):
        table = encoder.get_input_embeddings().weight
        for name, parameter in encoder.named_parameters():
            if parameter is table:
                rows = table.detach().cpu()
                state[name] = encoder.whole_table.index_copy(0, encoder.kept_rows, rows)
    return state
