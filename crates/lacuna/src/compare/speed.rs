//! Decode speed of several engines that take turns, so that a machine that slows down slows all of them alike.

use super::report::Speed;
use crate::{
    engine::{Engine, Session},
    error::{Error, Result},
};
use std::time::Instant;

/// What is timed.
#[derive(Clone, Copy, Debug)]
pub struct Race<'a> {
    /// Prefilled and not timed.
    pub prompt: &'a [u32],
    /// Decoded one by one, the same for all engines: what is skipped depends on the text.
    pub tokens: &'a [u32],
    /// Timed rounds, behind one that warms up.
    pub rounds: usize,
}

/// Seconds per round of every engine, the first of which is the dense one. Each round begins with another engine.
/// `progress(done, all)` counts rounds.
///
/// # Errors
/// As [`Session::decode`].
pub fn race(engines: &[&Engine], race: Race<'_>, mut progress: impl FnMut(usize, usize)) -> Result<Vec<Speed>> {
    if engines.is_empty() || race.tokens.is_empty() || race.rounds == 0 {
        return Err(Error::Argument { name: "race", problem: "there is nothing to time".into() });
    }
    let context = race.prompt.len() + race.tokens.len();
    let mut sessions = engines.iter().map(|e| e.session(context)).collect::<Result<Vec<_>>>()?;
    for session in sessions.iter_mut().filter(|_| !race.prompt.is_empty()) {
        session.prefill(race.prompt)?;
    }
    let mut seconds = vec![Vec::with_capacity(race.rounds); sessions.len()];
    for round in 0..=race.rounds {
        for turn in 0..sessions.len() {
            let i = (turn + round) % sessions.len();
            let taken = once(&mut sessions[i], race)?;
            if round > 0 {
                seconds[i].push(taken);
            }
        }
        progress(round, race.rounds);
    }
    let dense = &seconds[0];
    Ok(seconds.iter().map(|own| summary(own, dense, race.tokens.len())).collect())
}

fn once(session: &mut Session, race: Race<'_>) -> Result<f64> {
    session.truncate(race.prompt.len());
    let start = Instant::now();
    for &token in race.tokens {
        session.decode(token)?;
    }
    Ok(start.elapsed().as_secs_f64().max(1e-9))
}

fn summary(own: &[f64], dense: &[f64], tokens: usize) -> Speed {
    let samples: Vec<f64> = own.iter().map(|s| tokens as f64 / s).collect();
    let ratios: Vec<f64> = own.iter().zip(dense).map(|(s, d)| d / s).collect();
    Speed { quartiles: quartiles(&samples), speedup: quartiles(&ratios), samples }
}

/// Lower quartile, median, upper quartile, by linear interpolation; zeros without values.
fn quartiles(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    [0.25, 0.5, 0.75].map(|q: f64| {
        let at = q * sorted.len().saturating_sub(1) as f64;
        let get = |i: f64| sorted.get(i as usize).copied().unwrap_or(0.0);
        get(at.floor()) * (1.0 - at.fract()) + get(at.ceil()) * at.fract()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round() {
        let s = summary(&[1.0, 2.0, 4.0], &[2.0, 4.0, 8.0], 8);
        assert_eq!((s.samples.as_slice(), s.speedup), (&[8.0, 4.0, 2.0][..], [2.0; 3]));
        assert_eq!(s.quartiles, [3.0, 4.0, 6.0]);
        assert_eq!(s.milliseconds()[1], 250.0);
    }

    #[test]
    fn quartiles_of_one_and_of_none() {
        assert_eq!(quartiles(&[5.0]), [5.0; 3]);
        assert_eq!(quartiles(&[]), [0.0; 3]);
    }
}
