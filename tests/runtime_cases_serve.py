"""What ranks do in test_serve_plan.py: build without weights, serve, answer."""

import importlib.util
from pathlib import Path

import torch

import planner
from planner.runtime.serve.kv import kv_bytes


def llama(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
             "max_position_embeddings": 64} | sizes  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def mixtral(**sizes):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
             "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
             "max_position_embeddings": 64} | sizes  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def gpt2(**sizes):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64} | sizes
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def gpt_oss(**sizes):
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
             "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
             "max_position_embeddings": 64} | sizes  # fmt: skip
    return GptOssForCausalLM(GptOssConfig(**sizes)).eval()


def qwen3_moe(**sizes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64,
             "num_hidden_layers": 3, "head_dim": 16, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96, "num_experts": 4,
             "num_experts_per_tok": 2, "max_position_embeddings": 64} | sizes  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()


def deepseek(**sizes):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64,
             "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4,
             "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
             "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "vocab_size": 96,
             "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
             "n_shared_experts": 1, "max_position_embeddings": 64} | sizes  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).eval()


def gemma(**sizes):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
             "sliding_window": 5, "max_position_embeddings": 64,
             "layer_types": ["sliding_attention", "full_attention"] * 2} | sizes  # fmt: skip
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval()


def llama4(**sizes):
    """Experts that are one bmm over all of them: no other way to run them can be set."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 96,
             "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4,
             "num_experts_per_tok": 1, "pad_token_id": 0,
             "max_position_embeddings": 64} | sizes  # fmt: skip
    return Llama4ForCausalLM(Llama4TextConfig(**sizes)).eval()


MODELS = {"llama": llama, "gemma": gemma, "mixtral": mixtral, "gpt2": gpt2, "gpt_oss": gpt_oss,
          "qwen3_moe": qwen3_moe, "deepseek": deepseek, "llama4": llama4}  # fmt: skip


class Mixture(torch.nn.Module):
    """Experts in a list, under a user's own loop: the tokens that picked an expert go through it,
    or all of them do and the others' results are multiplied by 0."""

    def __init__(self, sparse):
        super().__init__()
        self.sparse, self.top_k = sparse, 2
        self.gate = torch.nn.Linear(32, 4, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)
        weights, index = torch.topk(self.gate(x).softmax(-1), self.top_k)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            if self.sparse:
                rows, which = torch.where(index == k)
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, which, None])
            else:
                share = torch.where(index == k, weights, torch.zeros_like(weights))
                out = out + share.sum(-1, keepdim=True) * expert(x)
        return out.view(shape)


class Looped(torch.nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.emb, self.head = torch.nn.Embedding(96, 32), torch.nn.Linear(32, 96, bias=False)
        self.layers = torch.nn.ModuleList(Mixture(sparse) for _ in range(3))

    def forward(self, input_ids):
        x = self.emb(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def looped():
    """A mixture whose experts are modules of a list, and tokens."""
    torch.manual_seed(0)
    return Looped(True).eval(), torch.randint(0, 96, (2, 7))


def own_moe():
    """The example's mixture, which is of no library, and prompts."""
    path = Path(__file__).parents[1] / "examples" / "moe.py"
    spec = importlib.util.spec_from_file_location("example_moe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.build(size="tiny", n_layers=2, n_experts=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval(), torch.randint(0, 96, (3, 7))


def whole(kind):
    """The model with its weights, the same on every rank, and prompts."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    return model, torch.randint(0, 96, (2, 7))


def answer(model, ids, **options):
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


def bare(model):
    with planner.meta():
        made = type(model)(model.config)
    made.generation_config = model.generation_config
    return made.eval()


def served(rank, kind, path, weights, folder=None):
    """(answers, logits of the prompts, bytes on the device, names) of a rank under a plan."""
    model, ids = whole(kind)
    made = planner.serve(bare(model), planner.load(path), weights=weights, folder=folder,
                         device="cpu")  # fmt: skip
    return (answer(made, ids), made(ids).logits, made.served.loaded.device_bytes,
            [n for n, _ in made.named_parameters()])  # fmt: skip


def served_kept(rank, kind, path, weights):
    """(answers, bytes of keys and values at the end) of a rank."""
    model, ids = whole(kind)
    made = planner.serve(bare(model), planner.load(path), weights=weights, device="cpu")
    told = answer(made, ids, return_dict_in_generate=True)
    return told.sequences, kv_bytes(told.past_key_values)


def served_one(rank, kind, path, weights, folder):
    """(answers to one prompt, bytes below the device, experts of a layer) of a rank."""
    model, ids = whole(kind)
    made = planner.serve(bare(model), planner.load(path), weights=weights, folder=folder,
                         device="cpu")  # fmt: skip
    held = made.served.loaded
    count = len(next(iter(held.experts.values())).blocks)
    return answer(made, ids[:1]), held.host_bytes + held.disk_bytes, count


def served_apart(rank, kind, path, weights, folder, ends):
    """(greedy answers to one prompt, to three, sampled ones, sequences in the cache) of a rank.
    ends: the token that ends an answer."""
    model, ids = whole(kind)
    made = planner.serve(bare(model), planner.load(path), weights=weights, folder=folder,
                         device="cpu")  # fmt: skip
    ids = torch.cat([ids, ids[:1].flip(1)])
    told = answer(made, ids, eos_token_id=ends, return_dict_in_generate=True)
    torch.manual_seed(1)
    drawn = made.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0)
    held = next(x.keys.shape[0] for x in told.past_key_values.layers if x.is_initialized)
    return answer(made, ids[:1]), told.sequences, drawn, held


def served_own(rank, path):
    """(logits, losses) of the example's mixture on a rank."""
    model, ids = own_moe()
    return planner.serve(model, planner.load(path), device="cpu")(ids)


def served_looped(rank, path):
    """(logits, bytes on the device, on the host) of experts in a list on a rank."""
    model, ids = looped()
    made = planner.serve(model, planner.load(path), device="cpu")
    return made(ids), made.served.loaded.device_bytes, made.served.loaded.host_bytes


def ways(model, ids):
    """Greedy answers by every way to keep a cache, or none."""
    from transformers import DynamicCache, StaticCache

    def by_hand(cache):
        given, found = ids, []
        for _ in range(5):
            out = model(given, past_key_values=cache, use_cache=True)
            given, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            found.append(given)
        return torch.cat(found, 1)

    def twice():
        cache = DynamicCache(config=model.config)
        said = model.generate(ids[:, :4], max_new_tokens=3, past_key_values=cache, **greedy)
        more = torch.cat([said, ids[:, :2]], 1)
        return model.generate(more, max_new_tokens=3, past_key_values=cache, **greedy)

    greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return {
            "none given": by_hand(None), "one's own": by_hand(DynamicCache(config=model.config)),
            "static": by_hand(StaticCache(config=model.config, max_cache_len=16)),
            "static, named": answer(model, ids, cache_implementation="static"),
            "positional": model(ids, None, None, DynamicCache()).logits.argmax(-1),
            "no cache": answer(model, ids, use_cache=False), "a second call": twice(),
            "looked up": answer(model, ids[:1], prompt_lookup_num_tokens=2),
        }  # fmt: skip


def served_ways(rank, kind, path, weights):
    model, ids = whole(kind)
    return ways(planner.serve(bare(model), planner.load(path), weights=weights, device="cpu"), ids)
