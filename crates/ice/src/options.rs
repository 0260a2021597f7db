use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ice_core::{CheckpointOptions, ElasticBatch, Error, InitFrom, LrRule, ResumeFrom, RunConfig};
use ice_launch::LaunchArgs;

// A comment that clap can read would become the help text of the program.
#[doc = concat!(
    "The options of every training program, to be flattened into its own.\n\n",
    "A program without a command line makes them by [`RunOptions::new`]; the default is a command line without options.\n\n",
    "```\n",
    "use ice::RunOptions;\n",
    "let options = RunOptions::new().devices(\"cpu:0-1\").seed(3).out_dir(\"runs\");\n",
    "let options = RunOptions { check_finite: true, ..options };\n",
    "assert_eq!(options.log_every, 50);\n",
    "```"
)]
#[derive(Args, Debug, Clone)]
pub struct RunOptions {
    /// Options of the launcher. A program that a launcher has started ignores them.
    #[command(flatten)]
    pub launch: LaunchArgs,

    /// Seed of all randomness: initial parameters, order of samples, dropout.
    #[arg(long, default_value_t = 0, help_heading = "Run")]
    pub seed: u64,

    /// Folder for checkpoints. Each run makes a folder of its own in it.
    #[arg(long, value_name = "DIR", default_value = "out", help_heading = "Run")]
    pub out_dir: PathBuf,

    /// Save a checkpoint every STEPS training steps, in addition to those at the end of an epoch.
    #[arg(long, value_name = "STEPS", help_heading = "Run")]
    pub save_every_steps: Option<NonZeroU64>,

    /// Resume from a checkpoint: its folder, or `latest` for the newest checkpoint of this run id
    /// below the output folder, or `auto` for the same, or a start from the beginning if there is
    /// none yet.
    #[arg(long, value_name = "PATH|latest|auto", help_heading = "Run")]
    pub resume_from: Option<ResumeFrom>,

    /// Begin with the parameters in safetensors files: a file, the index of a sharded model, or a
    /// folder with either or a checkpoint. Keys are those of a checkpoint's model.safetensors, or
    /// PyTorch's own if one node has all parameters. A run that resumes does not read them.
    #[arg(long, value_name = "PATH", help_heading = "Run")]
    pub init_from: Option<PathBuf>,

    /// Replace the first match of a regular expression in each key of --init-from, such as
    /// '^module\.='. May be given several times.
    #[arg(long, value_name = "PATTERN=REPLACEMENT", requires = "init_from", help_heading = "Run")]
    pub init_rename: Vec<String>,

    /// Leave out the parameters whose key has a match of a regular expression, such as '^fc\.':
    /// they keep their random initial values. May be given several times.
    #[arg(long, value_name = "PATTERN", requires = "init_from", help_heading = "Run")]
    pub init_skip: Vec<String>,

    /// Load only the parameters that --init-from has. A warning names those that are missing there,
    /// and those that the program does not have. Different shapes are an error.
    #[arg(long, requires = "init_from", help_heading = "Run")]
    pub init_partial: bool,

    /// Start from the beginning, with a warning, if the checkpoint does not fit the program.
    #[arg(long, requires = "resume_from", help_heading = "Run")]
    pub resume_if_it_fits: bool,

    /// Resume only if everything in the checkpoint fits the program: also measures, validation
    /// datasets, lengths of tasks and the task list.
    #[arg(long, help_heading = "Run")]
    pub resume_strict: bool,

    /// Keep only the newest N checkpoints of the run.
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub keep_checkpoints: Option<NonZeroUsize>,

    /// All ranks write a share of each checkpoint, instead of rank 0 alone. All nodes must share
    /// the output folder.
    #[arg(long, help_heading = "Run")]
    pub split_checkpoints: bool,

    /// Upload each checkpoint to an object store too, as s3://bucket/folder.
    #[arg(long, value_name = "ADDRESS", help_heading = "Run")]
    pub upload_checkpoints: Option<String>,

    /// Check the gradients of every step. If one is not finite, end the run before it is applied,
    /// and name the ranks that it came from.
    #[arg(long, help_heading = "Run")]
    pub check_finite: bool,

    /// Effect on batches that are given per rank, and on learning rates, when nodes join or leave.
    #[arg(long, value_name = "RULE", value_enum, default_value_t, help_heading = "Run")]
    pub elastic_batch: BatchRule,

    /// If optimizers are sharded, send a copy of each rank's part to another rank every STEPS
    /// training steps, so that no part is lost with a rank. With 0 there are no copies, and all
    /// ranks return to the newest checkpoint instead.
    #[arg(long, value_name = "STEPS", default_value_t = 20, help_heading = "Run")]
    pub copy_shards_every: u64,

    /// Show the losses of every STEPS-th training step as TensorBoard events, in the run's folder.
    /// With 0, only the ends of epochs are shown.
    #[arg(long, value_name = "STEPS", default_value_t = 50, help_heading = "Run")]
    pub log_every: u64,

    /// Folder of the TensorBoard events. Default: the run's folder. With the same folder, resumed
    /// jobs continue one curve.
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    pub events_dir: Option<PathBuf>,
}

/// Effect on batches that are given per rank, and on learning rates, when nodes join or leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum BatchRule {
    /// The global batch stays the same: fewer ranks compute it in several passes.
    #[default]
    KeepGlobal,
    /// The share of each rank and the learning rate stay the same.
    KeepLocal,
    /// The share of each rank stays the same. The learning rate changes in proportion to the global
    /// batch.
    KeepLocalLinear,
    /// The share of each rank stays the same. The learning rate changes in proportion to the square
    /// root of the global batch.
    KeepLocalSqrt,
}

impl Default for RunOptions {
    fn default() -> Self {
        ice_launch::cli::defaults()
    }
}

impl RunOptions {
    /// Returns the options of an empty command line, whatever the environment variables are.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the devices, one rank each, such as `cuda:0-3` or `cpu:0-1`.
    #[must_use]
    pub fn devices(mut self, devices: impl Into<String>) -> Self {
        self.launch.devices = Some(devices.into());
        self
    }

    /// Sets the seed of all randomness.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the folder in which each run makes a folder of its own.
    #[must_use]
    pub fn out_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.out_dir = folder.into();
        self
    }

    /// Saves a checkpoint whenever this many training steps are done. With 0, only the tasks save.
    #[must_use]
    pub fn save_every_steps(mut self, steps: u64) -> Self {
        self.save_every_steps = NonZeroU64::new(steps);
        self
    }

    /// Sets the checkpoint to resume from.
    #[must_use]
    pub fn resume_from(mut self, from: ResumeFrom) -> Self {
        self.resume_from = Some(from);
        self
    }

    /// Sets the parameters to begin with, as `--init-from` takes them.
    #[must_use]
    pub fn init_from(mut self, path: impl Into<PathBuf>) -> Self {
        self.init_from = Some(path.into());
        self
    }

    /// Returns the configuration that the options describe.
    pub(crate) fn config(&self) -> Result<RunConfig, Error> {
        Ok(RunConfig {
            seed: self.seed,
            out_dir: self.out_dir.clone(),
            save_every_steps: self.save_every_steps.map(NonZeroU64::get),
            resume_from: self.resume_from.clone(),
            init_from: self.init()?,
            checkpoints: CheckpointOptions {
                keep_last: self.keep_checkpoints,
                split: self.split_checkpoints,
                upload_to: self.upload_checkpoints.clone(),
                strict: self.resume_strict,
                begin_if_misfit: self.resume_if_it_fits,
            },
            log_every: NonZeroU64::new(self.log_every),
            events_dir: self.events_dir.clone(),
            copy_shards_every: NonZeroU64::new(self.copy_shards_every),
            check_finite: self.check_finite,
            elastic_batch: match self.elastic_batch {
                BatchRule::KeepGlobal => ElasticBatch::KeepGlobal,
                BatchRule::KeepLocal => ElasticBatch::KeepLocal(LrRule::Keep),
                BatchRule::KeepLocalLinear => ElasticBatch::KeepLocal(LrRule::Linear),
                BatchRule::KeepLocalSqrt => ElasticBatch::KeepLocal(LrRule::Sqrt),
            },
        })
    }

    fn init(&self) -> Result<Option<InitFrom>, Error> {
        let Some(path) = &self.init_from else { return Ok(None) };
        let mut init = InitFrom::new(path).strict(!self.init_partial);
        for rename in &self.init_rename {
            let (pattern, replacement) = rename.split_once('=').ok_or_else(|| {
                Error::Usage(format!(
                    "--init-rename {rename}: has no `=`: give PATTERN=REPLACEMENT, such as '^module\\.='"
                ))
            })?;
            init = init.rename(pattern, replacement)?;
        }
        self.init_skip.iter().try_fold(init, |init, pattern| init.skip(pattern)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    /// Trains a net.
    #[derive(Parser, Debug)]
    struct Described {
        #[command(flatten)]
        run: RunOptions,
    }

    #[derive(Parser, Debug)]
    struct Plain {
        #[command(flatten)]
        run: RunOptions,
    }

    #[test]
    fn default_options_are_those_of_an_empty_command_line() {
        let parsed = Plain::try_parse_from(["program"]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(format!("{:?}", parsed.run), format!("{:?}", RunOptions::default()));
        let given =
            ["program", "--devices", "cpu:0-1", "--seed", "3", "--out-dir", "x", "--save-every-steps", "5"];
        let parsed = Plain::try_parse_from(given).unwrap_or_else(|error| panic!("{error}"));
        let built = RunOptions::new().devices("cpu:0-1").seed(3).out_dir("x").save_every_steps(5);
        assert_eq!(format!("{:?}", parsed.run), format!("{built:?}"));
    }

    #[test]
    fn help_of_a_program_is_its_own_comment() {
        let about = |command: clap::Command| command.get_about().map(ToString::to_string);
        assert_eq!(about(Described::command()).as_deref(), Some("Trains a net"));
        assert_eq!(about(Plain::command()), None);
    }
}
