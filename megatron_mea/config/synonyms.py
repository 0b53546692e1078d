"""What other trainers call our keys and values, for the hint beside an unknown one.

Names of Megatron-LM, transformers' TrainingArguments and configurations, torchtitan, OLMo-core, nanotron,
LLaMA-Factory, nanoGPT and PyTorch Lightning: the last part of theirs, in lower case and with underscores.
"""

from __future__ import annotations

KEY_SYNONYMS = {
    "model.vocab_size": "padded_vocab_size n_vocab true_vocab_size",
    "model.hidden_size": "dim d_model n_embd model_dim n_dim",
    "model.intermediate_size": "ffn_hidden_size ffn_dim d_ff n_inner mlp_hidden_size mlp_dim",
    "model.num_hidden_layers": "num_layers n_layers n_layer depth layers",
    "model.num_attention_heads": "n_heads n_head num_heads n_q_heads",
    "model.num_key_value_heads": ("n_kv_heads num_kv_heads num_query_groups n_query_groups num_key_value_groups"),
    "model.num_component_heads": "n_component_heads num_virtual_heads virtual_heads h_prime",
    "model.head_dim": "kv_channels d_head head_size",
    "model.attention_variant": ("attention attention_type attn_type attn_implementation attention_backend"),
    "model.hlc_init": "hlc_initializer hlc_initialization",
    "model.key_latent_dim": "kv_lora_rank kv_latent_dim latent_dim k_rank",
    "model.value_latent_dim": "v_rank v_latent_dim",
    "model.qk_norm": "qk_layernorm use_qk_norm qk_layer_norm query_key_norm",
    "model.attention_bias": ("add_qkv_bias qkv_bias add_bias_linear use_bias bias disable_bias_linear"),
    "model.head_norm_affine": "group_norm sub_ln head_norm",
    "model.rms_norm_eps": ("norm_eps norm_epsilon layernorm_epsilon layer_norm_eps layer_norm_epsilon ln_eps"),
    "model.rope_theta": "rotary_base rotary_emb_base rotary_theta rope_base",
    "model.rope_scaling": ("rope_parameters use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor"),
    "model.max_position_embeddings": "n_positions n_ctx max_position model_max_length",
    "model.tie_word_embeddings": (
        "tie_embeddings tied_embeddings weight_tying enable_weight_tying untie_embeddings_and_output_weights"
    ),
    "model.initializer_range": "init_std init_method_std initializer_std std",
    "model.num_experts": "num_local_experts n_routed_experts moe_num_experts n_experts experts",
    "model.num_experts_per_tok": "moe_router_topk moe_top_k top_k topk moe_topk num_experts_per_token router_topk",
    "model.moe_intermediate_size": "moe_ffn_hidden_size moe_hidden_size expert_intermediate_size moe_inter_dim",
    "model.norm_topk_prob": "moe_renormalize renormalize norm_expert_weight route_norm moe_normalize_expert_weights",
    "model.mlp_only_layers": "dense_layers n_dense_layers first_k_dense_replace moe_layer_freq",
    "model.decoder_sparse_step": "moe_every_n_layers interleave_moe_layer_step moe_layer_step",
    "model.router_aux_loss_coef": "moe_aux_loss_coeff aux_loss_coef aux_loss_alpha lb_loss_weight load_balance_coeff",
    "parallel.context_parallel_size": (
        "cp cp_size context_parallel context_parallel_degree context_parallelism ulysses_degree "
        "sequence_parallel_degree ring_degree sp_size"
    ),
    "parallel.expert_model_parallel_size": "ep ep_size expert_parallel expert_parallel_size expert_parallel_degree",
    "training.balance": "moe_router_load_balancing_type load_balancing load_balancing_type",
    "training.router_z_loss_coef": "moe_z_loss_coeff z_loss_weight router_z_loss z_loss_coeff",
    "data.train": (
        "data_path train_data_path train_data train_dataset train_file dataset dataset_path "
        "dataset_name dataset_folder mix mix_base_dir"
    ),
    "data.validation": (
        "valid_data_path validation_data_path valid_data val_data eval_data eval_dataset validation_file valid val"
    ),
    "data.tokenizer": (
        "tokenizer_path tokenizer_name tokenizer_model tokenizer_name_or_path tokenizer_type hf_assets_path"
    ),
    "data.seq_length": (
        "seq_len sequence_length max_seq_len max_seq_length max_sequence_length block_size "
        "context_length cutoff_len max_length"
    ),
    "data.document_mask": (
        "reset_attention_mask reset_position_ids eod_mask_loss intra_document_masking doc_mask "
        "generate_doc_lengths block_causal neat_packing"
    ),
    "parallel.tensor_model_parallel_size": (
        "tp tp_size tensor_parallel tensor_parallel_size tensor_parallel_degree tensor_model_parallel"
    ),
    "parallel.pipeline_model_parallel_size": (
        "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_parallel_degree pipeline_model_parallel"
    ),
    "parallel.sequence_parallel": ("sp use_sequence_parallel enable_sequence_parallel tp_linear_async_communication"),
    "parallel.zero_stage": (
        "zero stage zero_optimization use_distributed_optimizer data_parallel_sharding_strategy "
        "data_parallel_shard_degree fsdp sharding_strategy deepspeed"
    ),
    "parallel.timeout_minutes": (
        "timeout distributed_timeout_minutes ddp_timeout init_timeout_seconds train_timeout_seconds nccl_timeout"
    ),
    "optimizer.lr": "learning_rate peak_lr max_lr base_lr",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optimizer.eps": "adam_eps adam_epsilon epsilon",
    "optimizer.weight_decay": "wd decay",
    "optimizer.grad_clip": ("clip_grad max_grad_norm gradient_clipping gradient_clip_val grad_clip_norm max_norm"),
    "schedule.kind": ("lr_decay_style lr_scheduler_type lr_scheduler scheduler decay_type lr_schedule_type"),
    "schedule.warmup_steps": (
        "lr_warmup_iters lr_warmup_samples lr_warmup_fraction lr_warmup_steps warmup_iters warmup "
        "num_warmup_steps warmup_ratio"
    ),
    "schedule.min_lr_ratio": "min_lr min_lr_factor min_decay_lr lr_min alpha_f min_lr_rate",
    "schedule.decay_steps": (
        "lr_decay_iters lr_decay_steps lr_wsd_decay_iters lr_wsd_decay_steps decay_ratio num_decay_steps"
    ),
    "training.steps": (
        "train_iters max_steps max_iters num_steps num_train_steps train_steps total_steps "
        "num_iterations num_train_epochs epochs max_duration train_samples"
    ),
    "training.tokens": "train_tokens max_tokens total_tokens num_tokens",
    "training.global_batch_size": (
        "batch_size global_batch gbs train_batch_size total_batch_size "
        "gradient_accumulation_steps batch_accumulation_per_replica"
    ),
    "training.micro_batch_size": (
        "mbs micro_batch local_batch_size device_batch_size rank_microbatch_size "
        "per_device_train_batch_size train_micro_batch_size_per_gpu"
    ),
    "training.precision": (
        "dtype torch_dtype mixed_precision mixed_precision_param param_dtype bf16 fp16 autocast_precision"
    ),
    "training.activation_checkpointing": (
        "gradient_checkpointing recompute recompute_granularity recompute_activations "
        "activation_checkpoint ac_config checkpoint_activations"
    ),
    "training.compile": "torch_compile compile_model",
    "training.deterministic": "deterministic_mode full_determinism use_deterministic_algorithms",
    "training.distillation": "kd export_kd_teacher_load distill",
    "training.distillation.teacher": "teacher_model teacher_model_path teacher_path",
    "training.seed": "random_seed data_seed init_seed manual_seed",
    "evaluation.interval": (
        "eval_interval eval_steps eval_every val_check_interval val_interval validation_interval validation_freq"
    ),
    "evaluation.batches": "eval_iters eval_batches limit_val_batches max_eval_steps val_batches",
    "checkpoint.interval": (
        "save_interval save_steps save_every save_every_n_train_steps checkpoint_interval "
        "checkpoint_every ckpt_interval"
    ),
    "checkpoint.keep": "save_total_limit keep_latest_k keep_last save_top_k checkpoints_to_keep",
    "checkpoint.keep_every": "save_retain_interval keep_interval",
    "checkpoint.async_save": "async_mode use_async save_async async_checkpoint",
    "logging.interval": (
        "log_interval logging_steps log_freq log_every log_every_n_steps iteration_step_info_interval"
    ),
    "logging.tensorboard": "enable_tensorboard tensorboard_dir report_to logger",
    "logging.profile": "enable_profiling profile_step_start profile_step_end profile_freq profiler",
    "run.dir": (
        "output_dir out_dir save save_dir save_path save_folder checkpoint_dir checkpoints_path "
        "dump_folder folder default_root_dir"
    ),
    "run.init_from": (
        "load load_path pretrained_checkpoint initial_load_path init_checkpoint model_name_or_path model_name finetune"
    ),
    "run.resume_from": ("resume resume_from_checkpoint resume_checkpoint_path resume_step load_step ckpt_step"),
}
"""{key: their names for it}"""

VALUE_SYNONYMS = {
    "plain": "mha mqa gqa softmax standard vanilla baseline llama",
    "differential": "diff diff_transformer diff_attention",
    "talking_heads": "talking-heads talking",
    "gated": "gated_attention gate",
    "mea_no_norm": "hlc mea_without_norm",
    "orthogonal": "orthonormal qr",
    "normal": "gaussian random",
    "block": "identity eye average",
    "bf16": "bfloat16 torch.bfloat16 bf16-mixed amp_bf16 mixed 16 fp16 float16 half true",
    "fp32": "float32 torch.float32 float single 32 no full false",
    "none": "no off false disabled null",
    "selective": "sac op",
    "full": "true all block uniform recompute",
    "cosine": "cosine_with_min_lr cosine_annealing cosinewithwarmup cos",
    "constant": "constant_with_warmup const flat",
    "wsd": "warmup_stable_decay warmup-stable-decay trapezoidal trapezoid",
    "dynamic": "ntk dynamic_ntk",
}
"""{value of a choice: other names for it}"""
