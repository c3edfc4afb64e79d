//! The weights of experts behind a router with a ReLU.

use super::{Binder, fill, plain};
use crate::{
    error::{Error, Result},
    model::{
        spec::RouterScale,
        weights::{Linear, Mlp, Ungated},
    },
};
use lacuna_core::weight::{Orientation, Weight};

/// Sizes of the experts of a block.
struct Sizes {
    experts: usize,
    inner: usize,
    width: usize,
}

impl Sizes {
    fn all(&self) -> usize {
        self.experts * self.inner
    }
}

impl Binder<'_> {
    pub(super) fn relu_experts(&self, i: usize, experts: usize, inner: usize, scale: RouterScale) -> Result<Mlp> {
        let (n, width) = (&self.names.relu_experts, self.spec.width);
        let router = self.linear(self.names.router, &[i], experts, width)?;
        let gain = match scale {
            RouterScale::Rms { .. } => Some(self.source.vector(&self.name(n.norm, &[i], "weight"), experts)?),
            RouterScale::Plain | RouterScale::Sum { .. } => None,
        };
        let sizes = Sizes { experts, inner, width };
        let named = |pair: &[&str; 2]| pair.map(|name| format!("{}{}", self.prefix, fill(name, &[i])));
        let there = |pair: &[String; 2]| self.source.has(&pair[0]);
        let (ups, downs) = match n.alike.iter().map(named).find(there) {
            Some([up, down]) => (self.cut_rows(&up, &sizes)?, self.cut_channels(&down, &sizes)?),
            None => {
                let pairs: Vec<_> = n.pairs.iter().map(named).collect();
                let pair = pairs.iter().find(|p| there(p)).or(pairs.first());
                let [up, down] = pair.ok_or_else(|| self.no_such_experts())?;
                (self.ups(up, &sizes)?, self.downs(down, &sizes)?)
            }
        };
        let experts = ups.into_iter().zip(downs).map(|(up, down)| Ungated { up: plain(up), down });
        Ok(Mlp::ReluExperts { router, gain, experts: experts.collect() })
    }

    fn no_such_experts(&self) -> Error {
        let what = format!("experts behind a router with a ReLU in `{}`", self.spec.arch);
        Error::Unsupported { file: self.source.file.clone(), what, remedy: String::new() }
    }

    fn is_stacked(&self, name: &str) -> bool {
        self.source.tensors.get(name).is_none_or(|t| t.shape.len() != 2)
    }

    fn ups(&self, name: &str, s: &Sizes) -> Result<Vec<Weight>> {
        if self.is_stacked(name) {
            self.source.stacked(name, s.experts, s.inner, s.width)
        } else {
            self.cut_rows(name, s)
        }
    }

    fn downs(&self, name: &str, s: &Sizes) -> Result<Vec<Linear>> {
        if self.is_stacked(name) {
            let all = self.source.stacked(name, s.experts, s.width, s.inner)?;
            return Ok(all.into_iter().map(plain).collect());
        }
        let part = |e: usize| self.source.columns(name, s.width, s.all(), e * s.inner..(e + 1) * s.inner);
        (0..s.experts).map(|e| part(e).map(plain)).collect()
    }

    fn cut_rows(&self, name: &str, s: &Sizes) -> Result<Vec<Weight>> {
        (0..s.experts).map(|e| self.source.rows(name, s.all(), s.width, e * s.inner..(e + 1) * s.inner)).collect()
    }

    /// Parts of `name[experts * inner, width]` that are read by their channels.
    fn cut_channels(&self, name: &str, s: &Sizes) -> Result<Vec<Linear>> {
        let turned = |rows: Weight| {
            // Runs of the longer blocks have no kernel that adds them one by one.
            let bytes = rows.bytes().clone();
            let kept = rows.format().block_len() <= 32;
            let turned = Weight::new(rows.format(), Orientation::InputMajor, s.width, s.inner, bytes);
            turned.filter(|_| kept).map(plain).ok_or_else(|| Error::Unsupported {
                file: self.source.file.clone(),
                what: format!("tensor `{name}` of type {} in `[inputs, outputs]` order", rows.format().name()),
                remedy: "; convert the model to F16 or BF16".into(),
            })
        };
        self.cut_rows(name, s)?.into_iter().map(turned).collect()
    }
}
