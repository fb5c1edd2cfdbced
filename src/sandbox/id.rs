//! Identifiers: sandbox ids, access tokens, machine ids. All random, from the host's entropy.

use rustix::rand::{GetRandomFlags, getrandom};

use super::Error;

/// Digits of a sandbox id. Proxies and host names accept nothing else.
const DIGITS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// Random digits after the leading `i`: E2B's own ids have this form.
const ID_DIGITS: usize = 19;

/// Fills `bytes` from the host's random source.
pub(super) fn fill_random(bytes: &mut [u8]) -> Result<(), Error> {
    let mut at = 0;
    while at < bytes.len() {
        match getrandom(&mut bytes[at..], GetRandomFlags::empty()) {
            Ok(count) => at += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::Internal(format!("The host gives no random bytes: {errno}"))),
        }
    }
    Ok(())
}

/// `i` and 19 of `[a-z0-9]`: about 98 random bits.
pub(super) fn sandbox_id() -> Result<String, Error> {
    let mut id = String::with_capacity(ID_DIGITS + 1);
    id.push('i');
    while id.len() <= ID_DIGITS {
        let mut bytes = [0; 32];
        fill_random(&mut bytes)?;
        // 252 is the largest multiple of 36 that fits into a byte: larger values would favour the first digits.
        for byte in bytes.into_iter().filter(|byte| *byte < 252).take(ID_DIGITS + 1 - id.len()) {
            id.push(char::from(DIGITS[usize::from(byte) % DIGITS.len()]));
        }
    }
    Ok(id)
}

/// `bytes` random bytes in hexadecimal.
pub(super) fn hex_token(bytes: usize) -> Result<String, Error> {
    let mut random = vec![0; bytes];
    fill_random(&mut random)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_e2bs_form_and_differ() {
        let ids: std::collections::HashSet<String> = (0..100).map(|_| sandbox_id().unwrap()).collect();
        assert_eq!(ids.len(), 100);
        for id in ids {
            assert_eq!(id.len(), 20);
            assert!(id.starts_with('i'));
            assert!(id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()), "{id}");
        }
    }

    #[test]
    fn tokens_have_the_asked_length() {
        let token = hex_token(16).unwrap();
        assert_eq!(token.len(), 32);
        assert!(token.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}
