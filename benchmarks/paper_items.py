"""Which equation, algorithm, figure and table of the paper is which code, under which test; what is missing.

    python benchmarks/paper_items.py

Writes the table of the README. tests/test_paper_items.py checks that everything it names exists and that the README
holds it as it is here.
"""

import dataclasses
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- python benchmarks/paper_items.py writes this table -->\n", "<!-- end of the table -->\n"


@dataclasses.dataclass(frozen=True)
class Item:
    paper: str
    """Its number in the paper."""
    what: str
    code: tuple[str, ...] = ()
    """Names under `ulx`, an option as the field of its configuration, or a file of the repository."""
    tests: tuple[str, ...] = ()
    """`file::name` under tests/."""
    missing: str = ""
    """What is not built yet."""

    def row(self) -> str:
        def names(items: tuple[str, ...]) -> str:
            return "<br>".join(f"`{item}`" for item in items)

        return f"| {self.paper} | {self.what} | {names(self.code)} | {names(self.tests)} | {self.missing} |"


ITEMS = (
    Item(
        "Eq. 1",
        "the VAE bound: decoder plus rate",
        ("bound.Bound",),
        ("test_models.py::test_the_bound_is_algorithm_1", "test_bound.py::test_bound_adds_its_terms"),
    ),
    Item(
        "Eq. 2",
        "the diffusion bound, the same for every schedule",
        ("losses.diffusion_loss", "schedules.Schedule", "bound.estimate_rate"),
        ("test_losses.py::TestDiffusionLossAgainstItsIntegral", "test_bound.py::TestRate"),
    ),
    Item(
        "Eq. 3",
        "L_z: unweighted, with the terminal KL",
        ("losses.prior_loss", "losses.terminal_kl"),
        ("test_losses.py::TestTerminalKl", "test_losses.py::TestDiffusionLossAgainstItsIntegral"),
    ),
    Item(
        "Eq. 4",
        "L_x, w = c_lf sigmoid(b − λ)",
        ("losses.decoder_loss", "weightings.Sigmoid"),
        ("test_losses.py::TestDiffusionLossAgainstItsIntegral", "test_weightings.py::TestSigmoid"),
    ),
    Item(
        "Eq. 5",
        "an encoder of mean and variance; L_e",
        ("losses.encoder_loss", "posterior.Posterior", "nn.encoder.EncoderConfig.variance"),
        (
            "test_posterior.py::TestEncoderOfVariance",
            "test_variants.py::test_learned_variance_is_paid_for_and_bought",
        ),
    ),
    Item(
        "Alg. 1",
        "stage 1: encoder, prior and decoder together",
        ("models.UnifiedLatents.bound", "stages.autoencoder_loss"),
        (
            "test_models.py::test_the_bound_is_algorithm_1",
            "test_models.py::test_training_minimises_bits_per_pixel_of_the_sum",
        ),
    ),
    Item(
        "§3.3",
        "stage 2: the base model on the frozen latents",
        ("stages.base_loss", "config.Config.base_bias"),
        ("test_models.py::test_stage_2_leaves_the_encoder_alone_and_drops_labels",),
    ),
    Item(
        "Alg. 2",
        "sampling, which stops at λ_z(0)",
        ("samplers.sample", "generate.sample_latents", "generate.decode"),
        ("test_samplers.py::test_stops_at_the_grid_s_last_noise_level", "test_samplers.py::test_order_of_convergence"),
    ),
    Item(
        "beyond it",
        "DDIM, Heun, DPM-Solver++(2M), Tsit5, ancestral, reverse SDE",
        ("samplers.sample", "solvers", "benchmarks/solver_orders.py", "benchmarks/sampling.py"),
        (
            "test_samplers.py::test_order_of_convergence",
            "test_samplers.py::TestStochastic",
            "test_benchmarks.py::test_sampling_spends_what_it_reports_and_is_not_repeated",
        ),
    ),
    Item(
        "beyond it",
        "guidance: classifier-free, within an interval, by a weaker model",
        ("guidance.classifier_free", "guidance.within", "guidance.autoguidance"),
        ("test_guidance.py::TestInterval", "test_guidance.py::TestAutoguidance"),
    ),
    Item(
        "beyond it",
        "estimators of the bound: stratified, antithetic, low-discrepancy, learned; errors from replicates",
        ("bound.estimate_rate", "bound.estimate_decoder", "time_sampling", "benchmarks/rate_estimators.py"),
        (
            "test_bound.py::TestEstimators",
            "test_time_sampling.py::TestPlacements",
            "test_time_sampling.py::TestProposal",
        ),
    ),
    Item(
        "beyond it",
        "log p(z_0) by the probability flow, exact or Hutchinson trace",
        ("likelihood.log_likelihood", "likelihood.flow_rate"),
        ("test_likelihood.py::TestExactTrace", "test_likelihood.py::TestHutchinson"),
    ),
    Item(
        "beyond it",
        "rate control: c_lf adapted until the held-out rate is the one asked for",
        ("rate_control.RateController", "rate_control.RateConfig", "benchmarks/rate_control.py"),
        (
            "test_rate_control.py::test_loop_closes_on_a_training_unlike_its_model",
            "test_rate_control.py::test_adapts_logs_and_resumes_bit_for_bit",
        ),
    ),
    Item(
        "beyond it",
        "post-hoc EMA (EDM2): an average of any width, chosen after training",
        ("ema.synthesis", "config.TrainConfig.posthoc_ema", "runs.load"),
        (
            "test_ema.py::test_another_width_is_what_tracking_it_would_have_given",
            "test_ema.py::test_least_squares_against_a_grid",
            "test_snapshots.py::TestRun",
        ),
    ),
    Item(
        "Fig. 3",
        "the weighting on the ε-loss",
        ("weightings.Sigmoid", "benchmarks/weightings.py"),
        (
            "test_weightings.py::TestSigmoid",
            "test_losses.py::test_same_loss_whatever_the_network_predicts",
        ),
    ),
    Item(
        "Fig. 4",
        "distance against training compute, beside pixels and a KL autoencoder",
        ("flops.forward_flops", "variants.VARIANTS", "benchmarks/compute_vs_fid.py"),
        (
            "test_points.py::test_pixels_have_as_many_tokens_as_latents",
            "test_points.py::test_pixels_are_trained_for_as_much_as_latents_cost_altogether",
            "test_flops.py::test_transformer_block_forward_and_backward",
        ),
        missing="ImageNet",
    ),
    Item(
        "§5.1",
        "architectures",
        (
            "presets.PAPER",
            "nn.encoder.Encoder",
            "nn.uvit.UViT",
            "nn.conditions.Conditions",
            "frames.given_frames",
            "benchmarks/architectures.py",
        ),
        (
            "test_presets.py::test_networks_are_those_of_section_5_1",
            "test_presets.py::test_preset_initialises_and_takes_a_step",
            "test_nn.py::test_network_of_a_still_video_is_the_image_network",
            "test_frames.py::test_samples_follow_the_given_frames_alone",
            "test_conditions.py::test_a_tiny_set_is_overfitted_by_each_condition",
        ),
    ),
    Item(
        "§5.2",
        "FLOPs; PSNR; FID and FVD; folders of images or videos, and cards, compared",
        (
            "flops.forward_flops",
            "cost.network_costs",
            "metrics.images.psnr",
            "metrics.frechet.frechet_distance",
            "metrics.inception.InceptionV3",
            "metrics.i3d.I3D",
            "metrics.compare.compare",
            "data.video.read_clip",
            "cards.differences",
            "evaluation.evaluate",
        ),
        (
            "test_flops.py::test_transformer_block_forward_and_backward",
            "test_presets.py::test_base_flops",
            "metrics/test_images.py::test_psnr_of_a_known_error",
            "metrics/test_frechet.py::test_other_gaussians_against_scipy",
            "metrics/test_inception.py::test_every_layer_and_the_features",
            "metrics/test_i3d.py::test_logits_of_a_black_video_are_those_of_the_original_module",
            "metrics/test_compare.py::test_card_and_table",
            "metrics/test_compare_videos.py::test_fvd_of_i3d_itself",
            "data/test_video.py::test_which_frames_a_clip_has",
            "test_cards.py::test_refuses_with_the_field_that_differs",
            "test_continuations.py::test_clips_are_compared_with_the_held_out_ones_by_fvd",
        ),
    ),
    Item(
        "beyond it",
        "kernel distance (KID's estimator); precision and recall; SSIM; LPIPS",
        (
            "metrics.kernel.kernel_distance",
            "metrics.manifold.precision_recall",
            "metrics.images.ssim",
            "metrics.lpips.LPIPS",
        ),
        (
            "metrics/test_kernel.py::test_is_exactly_unbiased",
            "metrics/test_kernel.py::test_gaussians_in_one_dimension",
            "metrics/test_manifold.py::test_is_the_definition",
            "metrics/test_images.py::test_ssim_against_scipy",
            "metrics/test_lpips.py::test_activations_and_distance_with_drawn_weights",
        ),
    ),
    Item(
        "Tab. 1, Fig. 6",
        "text-to-image: captions, alignment (retrieval, CLIP score); its baselines: pixel diffusion, a KL autoencoder "
        "with a base model",
        (
            "nn.conditions.TextInput",
            "text.encoders.TextEncoder",
            "data.captions.captioned",
            "prompted.prompted",
            "metrics.clip_score.score",
            "presets.PAPER",
            "variants.VARIANTS",
            "decoders.PixelDecoder",
            "decoders.RegressionDecoder",
            "benchmarks/text_to_image.py",
        ),
        (
            "test_conditions.py::test_a_tiny_set_is_overfitted_by_each_condition",
            "test_prompted.py::test_numbers_and_pictures_of_the_prompts",
            "metrics/test_retrieval.py::test_chance_is_the_mean_over_all_other_prompts",
            "text/test_bert.py::test_the_network_with_drawn_weights",
            "data/test_caption_files.py::test_bad_text_files_are_named_and_counted_or_refused",
            "test_presets.py::test_base_flops",
            "test_variants.py::test_pixels_are_their_own_latent",
            "test_variants.py::test_runs_from_end_to_end",
        ),
        missing="its 512 pixels and CLIP's weights",
    ),
    Item(
        "Tab. 2",
        "loss factor",
        ("config.Config.loss_factor", "benchmarks/loss_factor.py", "benchmarks/bitrate_vs_fid.py"),
        ("test_weightings.py::TestSigmoid",),
        missing="ImageNet",
    ),
    Item(
        "Tab. 3",
        "channels of the latent",
        ("nn.encoder.EncoderConfig.latent_channels", "benchmarks/latent_shape.py"),
        (
            "test_nn.py::test_encoder_reduces_and_every_parameter_counts",
            "test_benchmarks.py::test_latents_have_their_shapes_at_comparable_compute",
        ),
        missing="results",
    ),
    Item(
        "Tab. 4",
        "shape of the latent",
        ("nn.encoder.EncoderConfig.patch", "nn.encoder.EncoderConfig.down", "benchmarks/latent_shape.py"),
        (
            "test_nn.py::test_encoder_of_a_still_video_is_the_image_encoder",
            "test_benchmarks.py::test_latents_have_their_shapes_at_comparable_compute",
        ),
        missing="results",
    ),
    Item(
        "Tab. 5",
        "bits under the base model; MSE autoencoder, N(0, I) prior",
        (
            "bound.estimate_rate",
            "evaluation.evaluate",
            "models.ModelConfig.reconstruction",
            "models.ModelConfig.latent_prior",
            "benchmarks/ablations.py",
        ),
        (
            "test_evaluation.py::test_rate_under_the_base_model_is_without_a_label",
            "test_variants.py::test_regression_decoder_weighs_as_its_cut_off",
            "test_posterior.py::TestStandardNormal",
            "test_benchmarks.py::test_ablations_differ_from_the_baseline_in_what_they_name",
        ),
        missing="results",
    ),
    Item(
        "Tab. 6",
        "ablations A, B, C, D",
        (
            "config.Config.prior_gradient",
            "config.Config.kl_weight",
            "models.ModelConfig.logsnr_0",
            "config.Config.autoencoder",
            "nn.encoder.EncoderConfig.variance",
            "benchmarks/ablations.py",
        ),
        (
            "test_variants.py::test_stop_gradient_leaves_the_encoder_the_decoder_and_a_small_kl",
            "test_variants.py::test_runs_from_end_to_end",
            "test_variants.py::test_an_autoencoder_of_another_run",
            "test_benchmarks.py::test_ablations_differ_from_the_baseline_in_what_they_name",
        ),
        missing="results",
    ),
    Item(
        "App. B",
        "a single stage, with a shifted decoder loss or with λ_z(0) drawn from a logistic",
        (
            "config.Config.single_stage",
            "config.Config.sigmoid_bias",
            "models.ModelConfig.logsnr_0_bias",
            "weightings.TruncatedLogistic",
        ),
        (
            "test_posterior.py::TestTruncatedLogistic",
            "test_variants.py::test_logistic_decoder_is_told_the_noise_of_its_latent",
        ),
    ),
    Item(
        "Fig. 7, 8",
        "reconstructions against the loss factor; b against c_lf",
        ("config.Config.sigmoid_bias", "weightings.cutoff", "benchmarks/bitrate_vs_fid.py"),
        ("test_weightings.py::test_cutoff_is_where_the_weight_is_one",),
    ),
)


def table() -> str:
    header = "| paper | what | here | test | not built yet |\n|---|---|---|---|---|\n"
    return header + "".join(item.row() + "\n" for item in ITEMS)


def with_table(text: str) -> str:
    """A README's text with the table between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


def main() -> None:
    README.write_text(with_table(README.read_text()))
    print(table())


if __name__ == "__main__":
    main()
