//! Which pieces of a grammar may be matched by one regular expression.
//!
//! The lexer of llguidance takes the longest match, where GBNF means any. Both are the same if no match of a terminal is the
//! beginning of a longer match of one: this is checked on a deterministic automaton of all terminals.

use regex_automata::{
    Anchored, MatchKind,
    dfa::{Automaton, StartError, dense},
    nfa::thompson,
    util::{primitives::StateID, start},
};
use std::collections::{HashMap, HashSet};

/// Most bytes of an automaton; larger ones count as clashing.
const AUTOMATON: usize = 1 << 20;
/// Most states that are walked.
const STATES: usize = 5_000;

/// Numbers of the terminals (regular expressions) with a match that begins with a shorter match of one. `None` if that cannot
/// be said with bounded work.
pub(super) fn clashes(terminals: &[&str]) -> Option<HashSet<usize>> {
    let dfa = dense::Builder::new()
        .configure(
            dense::Config::new()
                .start_kind(regex_automata::dfa::StartKind::Anchored)
                .match_kind(MatchKind::All)
                .dfa_size_limit(Some(AUTOMATON))
                .determinize_size_limit(Some(AUTOMATON)),
        )
        .thompson(thompson::Config::new().nfa_size_limit(Some(AUTOMATON)))
        .build_many(terminals)
        .ok()?;
    let states = States::walk(&dfa).ok()??;
    let mut clashing = HashSet::new();
    // Forwards from behind every match: what else ends there.
    let mut seen = vec![false; states.next.len()];
    let ends = states.next.iter().zip(&states.matched).filter(|(_, matched)| !matched.is_empty());
    let mut open: Vec<usize> = ends.flat_map(|(next, _)| next.iter().copied()).collect();
    while let Some(s) = open.pop() {
        if !std::mem::replace(&mut seen[s], true) {
            clashing.extend(&states.matched[s]);
            open.extend(&states.next[s]);
        }
    }
    Some(clashing)
}

/// The reachable part of an automaton.
struct States {
    /// Which terminals match what led to each state.
    matched: Vec<Vec<usize>>,
    next: Vec<Vec<usize>>,
}

impl States {
    /// `None` if there are too many.
    fn walk(dfa: &impl Automaton) -> Result<Option<Self>, StartError> {
        let first = dfa.start_state(&start::Config::new().anchored(Anchored::Yes))?;
        let mut numbers = HashMap::from([(first, 0)]);
        let mut order = vec![first];
        let (mut matched, mut next) = (Vec::new(), Vec::new());
        while let Some(&state) = order.get(next.len()) {
            let end = dfa.next_eoi_state(state);
            matched.push(match dfa.is_match_state(end) {
                true => (0..dfa.match_len(end)).map(|i| dfa.match_pattern(end, i).as_usize()).collect(),
                false => Vec::new(),
            });
            let mut targets: Vec<StateID> = (0..=255).map(|byte| dfa.next_state(state, byte)).collect();
            targets.sort_unstable();
            targets.dedup();
            targets.retain(|&t| !dfa.is_dead_state(t));
            next.push(
                targets
                    .into_iter()
                    .map(|t| {
                        *numbers.entry(t).or_insert_with(|| {
                            order.push(t);
                            order.len() - 1
                        })
                    })
                    .collect::<Vec<usize>>(),
            );
            if order.len() > STATES {
                return Ok(None);
            }
        }
        Ok(Some(Self { matched, next }))
    }
}
