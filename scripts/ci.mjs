#!/usr/bin/env node
// What continuous integration runs: lint, the Rust tests, `npm test`, then `npm run test:kvm`. Ends with one line that sums
// up all test runners.

import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { spawn } from 'node:child_process'
import { heading, main, root } from './progress.mjs'

const totals = { passed: 0, failed: 0 }
const broken = []

/** Runs a program with its output shown; `onLine` sees each line of its standard output. */
function show(name, command, args, onLine) {
  heading(`\n=== ${name}`)
  return new Promise((done) => {
    const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'inherit'] })
    let rest = ''
    child.stdout.setEncoding('utf8')
    child.stdout.on('data', (text) => {
      process.stdout.write(text)
      const lines = (rest + text).split('\n')
      rest = lines.pop()
      lines.forEach((line) => onLine?.(line))
    })
    child.on('error', (error) => {
      process.stderr.write(`Cannot run ${command}: ${error.message}\n`)
      broken.push(name)
      done()
    })
    child.on('close', (code) => {
      if (code !== 0) broken.push(name)
      done()
    })
  })
}

await main(async () => {
  process.chdir(root)
  await show('lint', process.execPath, ['scripts/lint.mjs'])
  await show('cargo test', 'cargo', ['test', '--workspace', '--locked', '--no-fail-fast'], (line) => {
    const result = /^test result: \w+\. (\d+) passed; (\d+) failed/.exec(line)
    if (result) {
      totals.passed += Number(result[1])
      totals.failed += Number(result[2])
    }
  })
  const scratch = mkdtempSync(join(tmpdir(), 'amberbox-ci-'))
  try {
    const report = join(scratch, 'jest.json')
    await show('npm test', process.execPath, ['scripts/test.mjs', '--json', `--outputFile=${report}`])
    const jest = JSON.parse(readFileSync(report, 'utf8'))
    totals.passed += jest.numPassedTests
    // A file that could not run at all counts as one failed test.
    totals.failed += jest.numFailedTests + jest.numRuntimeErrorTestSuites
  } catch (error) {
    if (error.code !== 'ENOENT') throw error
  } finally {
    rmSync(scratch, { recursive: true, force: true })
  }
  await show('npm run test:kvm', process.execPath, ['scripts/rig/rig.mjs'], (line) => {
    const result = /^In the outer guest: (\d+) passed, (\d+) failed/.exec(line)
    if (result) {
      totals.passed += Number(result[1])
      totals.failed += Number(result[2])
    }
  })
  if (broken.length > 0) {
    process.stdout.write(`\nFailed: ${broken.join(', ')}\n`)
    if (totals.failed === 0) totals.failed = broken.length
    process.exitCode = 1
  }
  process.stdout.write(`\n${totals.passed} passed, ${totals.failed} failed\n`)
})
