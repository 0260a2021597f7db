use std::io::Write;
use std::num::NonZeroU64;

use tch::Tensor;

use crate::{Context, Node, Outputs, Result, Value};

/// Prints outputs of other nodes as `E{epochs}S{steps}: name = …`, where epochs and steps are those of training that are done.
/// Tensors are printed with their type and shape; of outputs of types that have no text there is the type.
///
/// Added with [`HyperGraph::print_forward_output`](crate::HyperGraph::print_forward_output).
pub struct Probe {
    names: Vec<String>,
    every: u64,
    left: u64,
    train_only: bool,
    main_only: bool,
    seen: u64,
    out: Box<dyn Write>,
}

impl Probe {
    /// The outputs of these nodes, at every step, on rank 0.
    pub fn of<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Self {
        Self {
            names: names.into_iter().map(Into::into).collect(),
            every: 1,
            left: u64::MAX,
            train_only: false,
            main_only: true,
            seen: 0,
            out: Box::new(std::io::stdout()),
        }
    }

    /// Only at every so many passes, beginning with the first.
    #[must_use]
    pub fn every(mut self, passes: NonZeroU64) -> Self {
        self.every = passes.get();
        self
    }

    /// So often in all and no more.
    #[must_use]
    pub fn total(mut self, times: u64) -> Self {
        self.left = times;
        self
    }

    /// In training alone.
    #[must_use]
    pub fn train_only(mut self) -> Self {
        self.train_only = true;
        self
    }

    /// On every rank.
    #[must_use]
    pub fn on_all_ranks(mut self) -> Self {
        self.main_only = false;
        self
    }

    /// To this and not to the standard output.
    #[must_use]
    pub fn to(mut self, out: impl Write + 'static) -> Self {
        self.out = Box::new(out);
        self
    }
}

impl Node for Probe {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let looks = x.is_training() || !self.train_only;
        if looks && self.seen.is_multiple_of(self.every) && self.left > 0 {
            self.left -= 1;
            let (epochs, steps) = (x.place().train_epochs, x.train_steps());
            for name in &self.names {
                // Every rank asks, so that none runs nodes that others do not.
                let output = x.value(name)?;
                if x.worker().is_main() || !self.main_only {
                    let text = output.text();
                    // Nobody is left to be told that nobody reads it.
                    let _ = writeln!(self.out, "E{epochs}S{steps}: {name} = {text}");
                }
            }
        }
        self.seen += u64::from(looks);
        Ok(Value::new(()))
    }
}

impl Value {
    /// For a person to read.
    pub(crate) fn text(&self) -> String {
        macro_rules! first {
            ($($kind:ty),*) => {
                $(if let Ok(value) = self.downcast::<$kind>() {
                    return value.to_string();
                })*
            };
        }
        first!(f64, f32, i64, i32, u64, usize, bool, String);
        let of_tensor = |tensor: &Tensor| format!("{tensor}").trim_end().to_owned();
        if let Ok(tensor) = self.downcast::<Tensor>() {
            if tensor.size().is_empty() {
                return tensor.double_value(&[]).to_string();
            }
            return format!("\n{}", of_tensor(&tensor));
        }
        if let Ok(pair) = self.downcast::<(Tensor, Tensor)>() {
            return format!("(\n{},\n{})", of_tensor(&pair.0), of_tensor(&pair.1));
        }
        format!("a {}", self.type_name())
    }
}
